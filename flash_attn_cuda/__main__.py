# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn_cuda`: see the package work on this machine, in three minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from flash_attn_cuda.demo import check, comparison, plot, train
from flash_attn_cuda.demo.report import report


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch sees no CUDA device")
        if options.plot:
            plot.check_installed()
        return _demo(options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> int:
    print(report(options.device))

    print("\nroot mean square error against float64, causal, grouped heads")
    print(f"{'':8}{'flash':>12}{'standard':>12}")
    errors = check.errors(options.device)
    for error in errors:
        print(f"{error.name:8}{error.flash:12.2e}{error.standard:12.2e}")
    wrong = [error.name for error in errors if not error.tolerable]
    if wrong:
        print(
            f"error: {', '.join(wrong)} is more than {check.TOLERATED_RATIO:g} times as far from "
            f"float64 as standard attention",
            file=sys.stderr,
        )
        return 1

    print("\nforward + backward, causal")
    print(f"{'seqlen':>8}{'flash':>12}{'standard':>12}{'flash':>14}{'standard':>14}")
    rows = []
    for row in comparison.rows(options.device, options.lengths):
        rows.append(row)
        costs = (row.flash, row.standard)
        times = "".join(f"{_milliseconds(cost):>12}" for cost in costs)
        peaks = "".join(f"{_mebibytes(cost):>14}" for cost in costs)
        print(f"{row.seqlen:8}{times}{peaks}", flush=True)

    losses: list[float] = []
    if not options.skip_training:
        print("\na small GPT learns the Python standard library, byte by byte", flush=True)
        trained = train.train(options.device, train.TrainConfig(steps=options.steps))
        losses = trained.losses
        print(f"loss {losses[0]:.2f} -> {trained.final_loss:.2f}. It now writes:\n")
        print(trained.sample)
        if trained.final_loss > options.target_loss:
            print(
                f"error: the loss ended at {trained.final_loss:.2f}, above the target of "
                f"{options.target_loss:g}",
                file=sys.stderr,
            )
            return 1

    if options.plot:
        plot.save(options.plot, rows, losses)
        print(f"\nplot written to {options.plot}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_cuda", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--lengths", type=int, nargs="+", help="sequence lengths to compare")
    parser.add_argument("--steps", type=int, default=train.TrainConfig.steps)
    parser.add_argument("--target-loss", type=float, default=2.5)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=Path("flash_attn_cuda.png"),
        metavar="FILE",
        help="write loss, time and memory as one picture (default %(const)s)",
    )
    return parser.parse_args(arguments)


def _milliseconds(cost: comparison.Cost | None) -> str:
    return "no memory" if cost is None else f"{cost.milliseconds:.1f} ms"


def _mebibytes(cost: comparison.Cost | None) -> str:
    return "no memory" if cost is None else f"{cost.peak_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
