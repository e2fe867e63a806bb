# SPDX-License-Identifier: BSD-3-Clause
"""Prints what bench.py measured as Markdown: every provider, and flash_attn_cuda over a reference.

python benchmarks/report.py dense.csv --reference sdpa_cudnn
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

Row = dict[str, str]
Values = dict[str, float]  # by provider

OURS = "flash_attn_cuda"
OWN = (OURS, "deterministic")
# suite -> column, its unit, factor to that unit, whether more is better
METRICS = {
    "dense": ("tflops", "TFLOP/s", 1.0, True),
    "host": ("p50_ms", "us per call", 1e3, False),
    "memory": ("peak_mib", "MiB", 1.0, False),
}
RUN = ("suite", "gpu", "dtype", "regime", "torch", "version", "commit")
PROBLEM = ("pass", "head_dim", "causal", "seqlen")
PASSES = ("fwd", "fwd_grad", "fwd_bwd", "bwd")


def grouped(rows: list[Row], columns: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def place(row: Row) -> tuple[int, int, str, int]:
    return PASSES.index(row["pass"]), int(row["head_dim"]), row["causal"], int(row["seqlen"])


def ratio(values: Values, reference: str, more_is_better: bool) -> float | None:
    """Ours over the reference; the reference "best" is the best of the others."""
    peers = {name: x for name, x in values.items() if name not in OWN}
    others = list(peers.values()) if reference == "best" else [values.get(reference)]
    measured = [x for x in others if x is not None]
    if OURS not in values or not measured:
        return None
    return values[OURS] / (max(measured) if more_is_better else min(measured))


def cell(row: Row | None, column: str, factor: float) -> str:
    if row is None or row["status"] != "ok":
        return "OOM" if row is not None and row["status"] == "out of memory" else "-"
    return f"{factor * float(row[column]):.4g}"


def tables(rows: list[Row], reference: str) -> Iterator[str]:
    """One table per suite and run, its geometric means, its worst row, and what did not run."""
    for run, unsorted in grouped(rows, RUN).items():
        measured = sorted(unsorted, key=place)
        suite = run[0]
        column, unit, factor, more_is_better = METRICS[suite]
        names = sorted({row["provider"] for row in measured}, key=lambda name: (name != OURS, name))
        yield f"### {suite}, {unit}: {', '.join(filter(None, run[1:]))}\n"
        head = ["pass", "head_dim", "causal", "seqlen", *names, f"ours / {reference}"]
        yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
        ratios: dict[tuple[str, ...], float] = {}
        for problem, alike in grouped(measured, PROBLEM).items():
            by_name = {row["provider"]: row for row in alike}
            values = {
                name: float(row[column]) for name, row in by_name.items() if row["status"] == "ok"
            }
            found = ratio(values, reference, more_is_better)
            if found is not None:
                ratios[problem] = found
            cells = [cell(by_name.get(name), column, factor) for name in names]
            last = "-" if found is None else f"{found:.3f}"
            yield f"| {' | '.join([*problem, *cells, last])} |"
        yield ""
        yield from summary(ratios, reference, more_is_better)
        yield from unmeasured(measured)


def summary(
    ratios: dict[tuple[str, ...], float], reference: str, more_is_better: bool
) -> Iterator[str]:
    if not ratios:
        yield f"No row has both {OURS} and {reference}.\n"
        return
    means: dict[tuple[str, ...], list[float]] = {}
    for problem, found in ratios.items():
        means.setdefault(problem[:2], []).append(found)
    yield f"| pass | head_dim | rows | geometric mean of ours / {reference} |\n|---|---|---|---|"
    for (pass_name, head_dim), group in means.items():
        mean = statistics.geometric_mean(group)
        yield f"| {pass_name} | {head_dim} | {len(group)} | {mean:.3f} |"
    worst = (min if more_is_better else max)(ratios, key=lambda problem: ratios[problem])
    pass_name, head_dim, causal, seqlen = worst
    mask = "causal" if causal == "yes" else "full"
    yield f"\nWorst: {ratios[worst]:.3f} at {pass_name}, head_dim {head_dim}, {mask}, {seqlen}.\n"


def unmeasured(rows: list[Row]) -> Iterator[str]:
    for (name, status), group in grouped(rows, ("provider", "status")).items():
        if status != "ok":
            yield f"- {name}, {len(group)} of the rows: {status}"
    yield ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--reference", default="sdpa_flash", help="a provider, or best: of all")
    options = parser.parse_args(arguments)
    with options.csv.open(newline="") as file:
        print("\n".join(tables(list(csv.DictReader(file)), options.reference)))


if __name__ == "__main__":
    main()
