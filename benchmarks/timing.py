# SPDX-License-Identifier: BSD-3-Clause
"""Times on the device and on the host, peak memory, and the GPU's driver, clock and power."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

Run = Callable[[], object]
T = TypeVar("T")

L2_FLUSH_BYTES = 256 * 2**20
CPU_RUNS = 3  # at least
GPU_LAG = 0.1  # of the host's time: a longer wait for the GPU means that the GPU was the bottleneck


def device_times(
    run: Run, reset: Run, device: str, warmup_ms: float, measure_ms: float
) -> tuple[list[float], tuple[int, float] | None]:
    """Milliseconds of single runs, each after an untimed `reset`, and what `gpu_state` says.

    On CUDA as triton.testing.do_bench does: events around each run, the L2 cache flushed before it.
    """
    run()
    return (
        _cuda_times(run, reset, warmup_ms, measure_ms)
        if device == "cuda"
        else (_cpu_times(run, reset, measure_ms), None)
    )


def _cuda_times(
    run: Run, reset: Run, warmup_ms: float, measure_ms: float
) -> tuple[list[float], tuple[int, float] | None]:
    flushed = _l2_buffer()

    def enqueue(count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        pairs = []
        for _ in range(count):
            reset()
            flushed.zero_()
            start, end = _event(), _event()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        return pairs

    torch.cuda.synchronize()
    estimates = enqueue(5)
    torch.cuda.synchronize()
    estimate_ms = estimates[0][0].elapsed_time(estimates[-1][1]) / len(estimates)

    enqueue(max(1, int(warmup_ms / estimate_ms)))
    pairs = enqueue(max(1, int(measure_ms / estimate_ms)))
    pairs[len(pairs) // 2][1].synchronize()
    state = gpu_state()  # halfway, while the GPU works
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs], state


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@cache
def _l2_buffer() -> torch.Tensor:
    return torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def _cpu_times(run: Run, reset: Run, measure_ms: float) -> list[float]:
    times: list[float] = []
    while len(times) < CPU_RUNS or sum(times) < measure_ms:
        reset()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def host_times(
    run: Run, reset: Run, device: str, calls: int, repeats: int
) -> tuple[list[float], str]:
    """Milliseconds that the host spends on one call, and a status.

    Each time is that of `calls` calls without a synchronisation, divided by `calls`. It is the
    host's own only while the GPU keeps up, so that next to nothing is left to wait for at the end.
    """

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times, lags = [], []
    for _ in range(2 * repeats):  # the first half warms up
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
            reset()
        returned = time.perf_counter()
        synchronize()
        times.append(1e3 * (returned - start) / calls)
        lags.append((time.perf_counter() - returned) / (returned - start))
    lag = statistics.median(lags[repeats:])
    status = "ok" if lag < GPU_LAG else f"GPU bound: it ends {lag:.0%} after the host"
    return times[repeats:], status


def lap_times(run: Iterable[T], device: str) -> tuple[list[T], list[float]]:
    """What a run yields, and the milliseconds that each item took.

    On CUDA by events, which leave the host free to run ahead: only the end is waited for.
    """
    now = _recorded if device == "cuda" else time.perf_counter
    items, marks = [], [now()]
    for item in run:
        items.append(item)
        marks.append(now())
    if device == "cuda":
        torch.cuda.synchronize()
        return items, [start.elapsed_time(end) for start, end in pairwise(marks)]
    return items, [1e3 * (end - start) for start, end in pairwise(marks)]


def _recorded() -> torch.cuda.Event:
    event = _event()
    event.record()
    return event


def peak_mib(run: Run, reset: Run) -> float:
    """MiB that one run on the GPU allocates beyond what was allocated before it."""
    run()
    reset()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.quantile(torch.tensor(times, dtype=torch.float64), points).tolist()
    return p20, p50, p80


def gpu_state() -> tuple[int, float] | None:
    """SM clock in MHz, and power in W, which newer GPUs average over a second; only read."""
    gpu = _nvml()
    if gpu is None:
        return None
    library, handle = gpu
    clock, milliwatts = ctypes.c_uint(), ctypes.c_uint()
    sm_clock = 1  # NVML_CLOCK_SM
    if library.nvmlDeviceGetClockInfo(handle, sm_clock, ctypes.byref(clock)):
        return None
    if library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)):
        return None
    return clock.value, milliwatts.value / 1e3


def driver_version() -> str:
    """Of the GPU; empty where it cannot be read."""
    gpu = _nvml()
    version = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    if gpu is None or gpu[0].nvmlSystemGetDriverVersion(version, len(version)):
        return ""
    return version.value.decode()


@cache
def _nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """The driver's management library and torch's current GPU in it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    return library, handle
