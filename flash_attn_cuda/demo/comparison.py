# SPDX-License-Identifier: BSD-3-Clause
"""Time and peak memory of forward + backward, beside standard attention, for growing lengths."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flash_attn_cuda import flash_attn_func
from flash_attn_cuda.demo.report import inputs
from flash_attn_cuda.reference import standard_attention

LENGTHS = {"cpu": (256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
HEADS = {"cpu": 4, "cuda": 16}
HEAD_DIM = 64
REPEATS = 5


@dataclass(frozen=True)
class Cost:
    milliseconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    seqlen: int
    flash: Cost | None  # None: out of memory
    standard: Cost | None


def rows(device: str, lengths: Sequence[int] | None = None) -> Iterator[Row]:
    """One row per length, measured when it is asked for."""
    for seqlen in lengths or LENGTHS[device]:
        yield Row(
            seqlen,
            _cost(flash_attn_func, device, seqlen),
            _cost(standard_attention, device, seqlen),
        )


def _cost(attention: Callable[..., Tensor], device: str, seqlen: int) -> Cost | None:
    q, k, v = inputs(device, (1, seqlen, HEADS[device], HEAD_DIM))
    dout = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), dout)

    try:
        step()  # the first call loads kernels and warms caches
        peak_bytes = _peak_cuda_bytes(step) if device == "cuda" else _peak_cpu_bytes(step)
        return Cost(
            statistics.median(_milliseconds(step, device) for _ in range(REPEATS)), peak_bytes
        )
    except torch.cuda.OutOfMemoryError:
        return None


def _milliseconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _peak_cuda_bytes(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu_bytes(step: Callable[[], None]) -> int:
    """The highest running sum of what PyTorch's CPU allocator hands out and takes back.

    The scratch of our kernels, some hundred KiB of tiles a thread, is not in it;
    tests/kernels/test_memory.py measures the whole process.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes into the table
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
