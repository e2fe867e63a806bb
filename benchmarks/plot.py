# SPDX-License-Identifier: BSD-3-Clause
"""Draws what bench.py measured: speed by length, speed-up over standard attention, peak memory.

And what traffic.py counted: bytes between DRAM and L2, and between L2 and the multiprocessors; and
training.py's losses, with how far each curve is from the mean of all.

python benchmarks/plot.py dense.csv memory.csv traffic.csv training_losses.csv --out figures
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, str]
Points = dict[str, list[tuple[int, float]]]  # by provider: (seqlen, value)

OURS, STANDARD = "flash_attn_cuda", "eager"
PASSES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward and backward"}
MASKS = {"no": "full", "yes": "causal"}
# A provider has one colour in every figure.
COLOURS = {
    OURS: "tab:blue",
    "deterministic": "lightsteelblue",
    "sdpa_flash": "tab:orange",
    "sdpa_cudnn": "tab:green",
    "sdpa_efficient": "tab:purple",
    "flex": "tab:brown",
    STANDARD: "tab:gray",
    "flash_attn": "tab:olive",
    "flash_attn_interface": "tab:red",
    "flash_attn.cute": "tab:pink",
}
# What theory says of traffic, by its column; dashed.
MODELS = {
    "4 N d + 4 N^2": "standard_bytes",
    "4 N d": "compulsory_bytes",
    "N^2 d^2 / M, an order": "theorem_bytes",
    "tiles of flash_attn_cuda": "tile_bytes",
}
STYLES = {name: ("o-", colour) for name, colour in COLOURS.items()} | {
    name: ("--", colour)
    for name, colour in zip(MODELS, ("black", "dimgray", "tab:red", "tab:cyan"), strict=True)
}


def read(paths: list[Path]) -> list[Row]:
    """The rows that were measured."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("status", "ok") == "ok"]
    return rows


def points_of(rows: list[Row], value: Callable[[Row], float]) -> Points:
    points: Points = {}
    for row in rows:
        points.setdefault(row["provider"], []).append((int(row["seqlen"]), value(row)))
    return points


def speeds(rows: list[Row]) -> Points:
    return points_of(rows, lambda row: float(row["tflops"]))


def speedups(rows: list[Row]) -> Points:
    """Standard attention's time over a provider's."""
    standard = {row["seqlen"]: float(row["p50_ms"]) for row in rows if row["provider"] == STANDARD}
    others = [row for row in rows if row["seqlen"] in standard and row["provider"] != STANDARD]
    return points_of(others, lambda row: standard[row["seqlen"]] / float(row["p50_ms"]))


def memory(rows: list[Row]) -> Points:
    return points_of(rows, lambda row: float(row["peak_mib"]))


def traffic(rows: list[Row], counted: tuple[str, ...], models: tuple[str, ...]) -> Points:
    """What was counted, added up, and models of it; a cell is empty where there is no value."""
    whole = [row for row in rows if all(row[column] for column in counted)]
    points = points_of(whole, lambda row: sum(float(row[x]) for x in counted) / 2**20)
    for name in models:
        column = MODELS[name]
        known = {(int(r["seqlen"]), float(r[column]) / 2**20) for r in rows if r[column]}
        points |= {name: sorted(known)} if known else {}
    return points


def dram(rows: list[Row]) -> Points:
    models = ("4 N d + 4 N^2", "4 N d", "N^2 d^2 / M, an order")
    return traffic(rows, ("dram_read_bytes", "dram_write_bytes"), models)


def on_chip(rows: list[Row]) -> Points:
    models = ("4 N d + 4 N^2", "N^2 d^2 / M, an order", "tiles of flash_attn_cuda")
    return traffic(rows, ("sm_read_bytes", "sm_write_bytes"), models)


# suite, quantity, unit, logarithmic
FIGURES: dict[str, tuple[str, Callable[[list[Row]], Points], str, bool]] = {
    "speed": ("dense", speeds, "TFLOP/s", False),
    "speedup": ("dense", speedups, "times the speed of standard attention", True),
    "memory": ("memory", memory, "peak memory, MiB", True),
    "dram": ("io", dram, "between DRAM and L2, MiB", True),
    "l2": ("io", on_chip, "between L2 and multiprocessors, MiB", True),
}


def draw(
    rows: list[Row], quantity: Callable[[list[Row]], Points], unit: str, logarithmic: bool
) -> Figure | None:
    """A line of panels for each pass and mask; None where there is nothing to draw."""
    measured = {(row["pass"], row["causal"]) for row in rows}
    lines = [line for line in itertools.product(PASSES, MASKS) if line in measured]
    head_dims = sorted({int(row["head_dim"]) for row in rows})
    if not any(quantity(rows).values()):
        return None
    figure = Figure(figsize=(4.2 * len(head_dims) + 1.8, 3.2 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(head_dims), squeeze=False)
    for (line, (pass_name, causal)), (col, head_dim) in itertools.product(
        enumerate(lines), enumerate(head_dims)
    ):
        panel = [
            row
            for row in rows
            if (row["pass"], row["causal"], int(row["head_dim"])) == (pass_name, causal, head_dim)
        ]
        title = f"{PASSES[pass_name]}, {MASKS[causal]}, head_dim {head_dim}"
        plot(panels[line][col], quantity(panel), title, unit if col == 0 else "", logarithmic)
    named = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    names = sorted(named, key=list(STYLES).index)
    handles = [named[name] for name in names]
    figure.legend(handles, names, loc="outside right upper", fontsize="small")
    return figure


def plot(axes: Any, points: Points, title: str, unit: str, logarithmic: bool) -> None:
    for name in sorted(points, key=list(STYLES).index):
        style, colour = STYLES[name]
        on_top = 3 if name == OURS else 2  # where lines meet
        x, y = zip(*sorted(points[name]), strict=True)
        axes.plot(x, y, style, color=colour, label=name, zorder=on_top)
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="sequence length", ylabel=unit)
    axes.grid(alpha=0.3)


def draw_training(rows: list[Row]) -> Figure:
    """The losses of a length in one panel, and what tells them apart below it."""
    curves: dict[int, dict[str, list[float]]] = {}  # by length and attention, step by step
    for row in rows:
        of_length = curves.setdefault(int(row["seqlen"]), {})
        of_length.setdefault(row["attention"], []).append(float(row["loss"]))
    figure = Figure(figsize=(4.2 * len(curves), 5.2), layout="constrained")
    ratios = {"squeeze": False, "sharex": True, "sharey": "row", "height_ratios": (2, 1)}
    panels = figure.subplots(2, len(curves), **ratios)
    for (seqlen, of_length), (losses, deviations) in zip(
        sorted(curves.items()), panels.T, strict=True
    ):
        means = [statistics.fmean(x) for x in zip(*of_length.values(), strict=True)]
        names = sorted(of_length, key=list(COLOURS).index, reverse=True)  # ours is drawn last
        for place, name in enumerate(names):
            width = 1 + 2 * (len(names) - 1 - place)  # so that a curve shows beneath another
            look = {"color": COLOURS[name], "label": name}
            losses.plot(of_length[name], linewidth=width, **look)
            off = [x - mean for x, mean in zip(of_length[name], means, strict=True)]
            deviations.plot(off, linewidth=1, **look)
        losses.set(title=f"training, seqlen {seqlen}")
        losses.legend(fontsize="small")
        deviations.set(xlabel="step")
        for axes in (losses, deviations):
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss, nats per byte")
    panels[1][0].set_ylabel("minus their mean")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(), help="folder; default: this one")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read(options.csv)
    for name, (suite, quantity, unit, logarithmic) in FIGURES.items():
        figure = draw([r for r in rows if r["suite"] == suite], quantity, unit, logarithmic)
        if figure is not None:
            figure.savefig(options.out / f"{name}.png", dpi=110)
    losses = [row for row in rows if row["suite"] == "loss"]
    if losses:
        draw_training(losses).savefig(options.out / "training.png", dpi=110)


if __name__ == "__main__":
    main()
