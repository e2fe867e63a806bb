# SPDX-License-Identifier: BSD-3-Clause
"""Trains a GPT of 121 million parameters with each attention from one seed, and writes CSV.

python benchmarks/training.py --out figures && python benchmarks/plot.py figures/*.csv --out figures
python benchmarks/training.py --seqlens 4096 --attention flash_attn_cuda eager sdpa_flash sdpa_cudnn
python benchmarks/training.py --device cpu --layers 1 --width 64 --seqlens 128 --tokens 512

Initial weights, batches and optimizer (fused AdamW) are the same in all runs of a length; on a GPU
bfloat16 autocast is on. eager is standard attention as usually written: matmul, mask, softmax,
matmul; autocast runs its softmax in float32, as it does everywhere. The text is the sources of
Python's standard library, a byte a token.

training.csv         a row per length and attention: median time of a step without the first tenth
                     of the steps, tokens per second of it, peak memory (all that torch allocated),
                     mean loss of the last 20 steps, and the loss difference
training_losses.csv  the loss of every step, in nats per byte

The loss difference is how far the curve is from standard attention's: the mean absolute difference
of running means over 20 steps. Implementations of exact attention differ in rounding alone, and
training amplifies that. So the difference of torch's own attention (sdpa_flash) is the noise beside
which ours is to be read. Where standard attention runs out of memory, both are held against the
first other attention than ours.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import bench
import providers
import torch
from timing import driver_version, lap_times
from torch import Tensor
from tqdm import tqdm

from flash_attn_cuda.demo.gpt import GPT, GPTConfig
from flash_attn_cuda.demo.train import TrainConfig, standard_library_sources, steps

OURS, STANDARD = "flash_attn_cuda", "eager"
RESULTS = (
    *("step_ms", "tokens_per_s", "peak_gib"),
    *("final_loss", "loss_difference", "difference_from"),
)
COLUMNS = (
    *("suite", "seqlen", "batch", "attention", "status", "layers", "width", "parameters", "steps"),
    *RESULTS,
    *("text", "gpu", "driver", "torch", "cuda", "version", "commit"),
)
LOSS_COLUMNS = ("suite", "seqlen", "attention", "step", "loss")
PRINTED = ("seqlen", "attention", "status", *RESULTS)
HEAD_DIM = 64
LEARNING_RATE = 6e-4  # usual at this size
SMOOTHED_STEPS = 20

Row = dict[str, object]
Curves = dict[str, list[float]]  # by attention: the loss of each step


def train(
    attention: str, seqlen: int, text: Tensor, options: argparse.Namespace
) -> tuple[Row, list[float]]:
    """What is measured of one run, and its losses."""
    provider = providers.load(attention)
    config = TrainConfig(
        steps=options.steps,
        batch=options.tokens // seqlen,
        learning_rate=LEARNING_RATE,
        warmup=options.steps // 15,
    )
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(config.seed)
    with torch.device(options.device):
        model = GPT(
            GPTConfig(
                context=seqlen,
                layers=options.layers,
                heads=options.width // HEAD_DIM,
                width=options.width,
                attention=provider.seqlen_first,
            )
        )
    run = steps(model, text, config)
    progress = tqdm(run, desc=f"{seqlen} {attention}", total=config.steps, unit="step")
    with provider.context():
        on_device, times = lap_times(progress, options.device)
    losses = torch.stack(on_device).tolist()
    step_ms = statistics.median(times[len(times) // 10 :])
    measured: Row = {
        "status": "ok",
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "step_ms": f"{step_ms:.5g}",
        "tokens_per_s": f"{1e3 * options.tokens / step_ms:.0f}",
        "final_loss": f"{statistics.fmean(losses[-SMOOTHED_STEPS:]):.4f}",
    }
    if options.device == "cuda":
        measured["peak_gib"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    return measured, losses


def compare(seqlen: int, text: Tensor, options: argparse.Namespace) -> tuple[list[Row], Curves]:
    """A row for each attention, and the curves of the runs that ended well."""
    rows, curves = [], {}
    for attention in options.attention:
        row: Row = {"suite": "training", "seqlen": seqlen, "batch": options.tokens // seqlen}
        try:
            measured, curves[attention] = train(attention, seqlen, text, options)
        except (torch.OutOfMemoryError, MemoryError):
            measured = {"status": "out of memory"}
        except Exception as error:
            measured = {"status": bench.reason(error, [])}
        rows.append(row | {"attention": attention} | measured)
        gc.collect()  # what a run leaves may refer to itself
        if options.device == "cuda":
            torch.cuda.empty_cache()
    found = differences(curves)
    return [row | found.get(str(row["attention"]), {}) for row in rows], curves


def differences(curves: Curves) -> dict[str, dict[str, str]]:
    """By attention, how far its curve is from standard attention's, or what stands in for it."""
    others = [name for name in curves if name != OURS]
    if not others:
        return {}
    reference = STANDARD if STANDARD in curves else others[0]
    means = {name: running_mean(losses) for name, losses in curves.items()}
    return {
        name: {
            "loss_difference": f"{(means[name] - means[reference]).abs().mean().item():.3g}",
            "difference_from": reference,
        }
        for name in curves
        if name != reference
    }


def running_mean(losses: list[float]) -> Tensor:
    window = min(SMOOTHED_STEPS, len(losses))
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)


def read_text(paths: list[Path] | None) -> tuple[Tensor, str]:
    """All bytes as uint8, and what to call them."""
    if not paths:
        text = standard_library_sources()
        return text, f"{len(text)} bytes of Python {platform.python_version()}'s standard library"
    joined = bytearray(b"".join(path.read_bytes() for path in paths))
    names = " ".join(path.name for path in paths)
    return torch.frombuffer(joined, dtype=torch.uint8), f"{len(joined)} bytes of {names}"


def writer(stack: ExitStack, path: Path, columns: tuple[str, ...]) -> csv.DictWriter[str]:
    """Writes line by line, so that an interrupted comparison leaves the lengths that it ended."""
    file = stack.enter_context(path.open("w", newline="", buffering=1))
    made = csv.DictWriter(file, columns, lineterminator="\n")
    made.writeheader()
    return made


def table(rows: list[Row], columns: tuple[str, ...] = PRINTED) -> str:
    """As Markdown."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [OURS, STANDARD, "sdpa_flash"]
    add("--attention", nargs="+", choices=providers.NAMES, default=names, help=" ".join(names))
    lengths = [1024, 4096, 16384]
    add("--seqlens", type=int, nargs="+", default=lengths, help="default: 1024 4096 16384")
    add("--tokens", type=int, default=16384, help="of a step, batch * seqlen; default: 16384")
    add("--steps", type=int, default=300, help="default: 300")
    # GPT-2 small has 124 million parameters in 12 layers of this width, 39 million of them in its
    # vocabulary. Bytes need next to none there, nor do rotary positions: 17 layers make up for it.
    add("--layers", type=int, default=17, help="default: 17")
    add("--width", type=int, default=768, help=f"heads * {HEAD_DIM}; default: 768")
    add("--text", type=Path, nargs="+", help="files to learn; default: the standard library")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda, else cpu")
    add("--out", type=Path, default=Path(), help="folder; default: this one")
    add("--commit", help="what to write as commit; default: what git says")
    options = parser.parse_args(arguments)
    if any(options.tokens % seqlen for seqlen in options.seqlens):
        parser.error(f"--tokens {options.tokens} is no multiple of every seqlen")
    if options.width % HEAD_DIM:
        parser.error(f"--width {options.width} is no multiple of {HEAD_DIM}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    text, name = read_text(options.text)
    if len(text) <= max(options.seqlens) + 1:
        sys.exit(f"{name} are too few for a sequence of {max(options.seqlens)}")
    text = text.to(options.device)
    driver = driver_version() if options.device == "cuda" else ""
    constants: Row = bench.environment(options) | {"driver": driver, "text": name}
    constants |= {key: getattr(options, key) for key in ("layers", "width", "steps")}
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        summary = writer(stack, options.out / "training.csv", COLUMNS)
        every_loss = writer(stack, options.out / "training_losses.csv", LOSS_COLUMNS)
        for seqlen in options.seqlens:
            measured, curves = compare(seqlen, text, options)
            rows += [row | constants for row in measured]
            summary.writerows(rows[-len(measured) :])
            every_loss.writerows(
                {"suite": "loss", "seqlen": seqlen, "attention": attention}
                | {"step": step, "loss": f"{loss:.6f}"}
                for attention, losses in curves.items()
                for step, loss in enumerate(losses)
            )
    print(table(rows))


if __name__ == "__main__":
    main()
