# SPDX-License-Identifier: BSD-3-Clause
"""One picture of what the demo measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flash_attn_cuda.demo.comparison import Cost, Row


def check_installed() -> None:
    """Fail before minutes of work, not after them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install matplotlib") from error


def save(path: Path, rows: Sequence[Row], losses: Sequence[float]) -> None:
    """Loss, time and memory side by side; the loss is left out where there is none."""
    from matplotlib.figure import Figure

    panels = 3 if losses else 2
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    *loss_axes, time_axes, memory_axes = figure.subplots(1, panels)
    for axes in loss_axes:
        axes.plot(losses, color="tab:blue")
        axes.set(title="Training loss", xlabel="step", ylabel="nats per byte")
    costs: tuple[tuple[Any, str, Callable[[Cost], float]], ...] = (
        (time_axes, "Time, forward + backward (ms)", lambda cost: cost.milliseconds),
        (memory_axes, "Peak memory (MiB)", lambda cost: cost.peak_bytes / 2**20),
    )
    for axes, title, quantity in costs:
        for name, colour in (("flash", "tab:blue"), ("standard", "tab:orange")):
            measured = [(row.seqlen, getattr(row, name)) for row in rows]
            points = [(seqlen, quantity(cost)) for seqlen, cost in measured if cost is not None]
            axes.loglog(*zip(*points, strict=True), "o-", color=colour, label=name, base=2)
        axes.set(title=title, xlabel="sequence length")
        axes.legend()
    figure.savefig(path, dpi=150)
