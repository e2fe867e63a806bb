# SPDX-License-Identifier: BSD-3-Clause
"""Times attention beside its peers, in turn on the same tensors, and writes CSV.

python benchmarks/bench.py --out dense.csv && python benchmarks/report.py dense.csv
python benchmarks/bench.py --device cpu --seqlens 512
python benchmarks/bench.py --suites host memory --providers flash_attn_cuda sdpa_flash
python benchmarks/bench.py --head-dims 128 --heads 32 --heads-kv 8 --causal yes

dense   time on the device of the forward pass without gradients and of the backward pass alone;
        batch is tokens / seqlen, heads are hidden / head_dim
host    time of the host per call at batch 1, seqlen 128, 8 heads, head_dim 64, causal: forward
        without gradients (fwd), forward with them (fwd_grad), forward and backward (fwd_bwd)
memory  peak memory of forward and backward at batch 1, gradients and output included

A provider that cannot run a row keeps the row, with the reason as its status. TFLOP/s count
4 * batch * heads * seqlen^2 * head_dim forward, 2.5 times that backward, and half of it for causal.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import providers
import torch
from timing import Run, device_times, host_times, peak_mib, quantiles
from torch import Tensor
from tqdm import tqdm

import flash_attn_cuda

COLUMNS = (
    *("suite", "pass", "head_dim", "seqlen", "batch", "heads", "heads_kv", "causal", "dtype"),
    *("provider", "status", "p20_ms", "p50_ms", "p80_ms", "tflops", "peak_mib", "regime"),
    *("gpu", "sm_clock_mhz", "power_w", "torch", "cuda", "version", "commit"),
)
SUITES = ("dense", "host", "memory")
REGIMES = {"burst": (25, 100), "sustained": (250, 1000)}  # ms of warming up and of measuring
DEFAULTS: dict[str, dict[str, object]] = {
    "cuda": {
        "dtype": "bfloat16",
        "tokens": 16384,
        "hidden": 2048,
        "seqlens": [512, 1024, 2048, 4096, 8192, 16384],
    },
    "cpu": {"dtype": "float32", "tokens": 2048, "hidden": 512, "seqlens": [512, 1024, 2048]},
}
HOST_PASSES = ("fwd", "fwd_grad", "fwd_bwd")
HOST_CALLS = {"cuda": (200, 20), "cpu": (20, 5)}  # calls between synchronisations, repeats

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One row of the CSV, before it is measured."""

    suite: str
    pass_name: str
    head_dim: int
    seqlen: int
    batch: int
    heads: int
    heads_kv: int
    causal: bool
    provider: str = ""

    @property
    def flops(self) -> float:
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return forward * (2.5 if self.pass_name == "bwd" else 1.0) * (0.5 if self.causal else 1.0)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Providers in turn on each problem, another one first each time."""
    for index, case in enumerate(problems(options)):
        first = index % len(options.providers)
        for provider in options.providers[first:] + options.providers[:first]:
            yield replace(case, provider=provider)


def problems(options: argparse.Namespace) -> Iterator[Case]:
    for suite in options.suites:
        if suite == "host":
            yield from (Case(suite, name, 64, 128, 1, 8, 8, True) for name in HOST_PASSES)
            continue
        names = options.passes if suite == "dense" else ["fwd_bwd"]
        for head_dim, seqlen in itertools.product(options.head_dims, options.seqlens):
            batch = max(1, options.tokens // seqlen) if suite == "dense" else 1
            heads = options.heads or options.hidden // head_dim
            heads_kv = options.heads_kv or heads
            for causal, name in itertools.product(options.causal, names):
                yield Case(suite, name, head_dim, seqlen, batch, heads, heads_kv, causal == "yes")


@lru_cache(maxsize=1)
def tensors(
    shape: tuple[int, int, int, int], heads_kv: int, device: str, dtype: str
) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, (batch, seqlen, heads, head_dim) each."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": getattr(torch, dtype)}
    batch, seqlen, heads, head_dim = shape
    return tuple(
        torch.randn((batch, seqlen, n, head_dim), **draw)
        for n in (heads, heads_kv, heads_kv, heads)
    )


def row(case: Case, options: argparse.Namespace) -> Row:
    described: Row = {
        "suite": case.suite,
        "pass": case.pass_name,
        "head_dim": case.head_dim,
        "seqlen": case.seqlen,
        "batch": case.batch,
        "heads": case.heads,
        "heads_kv": case.heads_kv,
        "causal": "yes" if case.causal else "no",
        "dtype": options.dtype,
        "provider": case.provider,
        "regime": options.regime if case.suite == "dense" else "",
    }
    if case.provider == "eager" and case.seqlen > options.eager_max_seqlen:
        return described | {"status": "left out by --eager-max-seqlen"}
    return described | attempt(partial(measure, case, options), options.device)


def attempt(measure: Callable[[], Row], device: str) -> Row:
    """What it measures, or the status that says why it cannot."""
    with warnings.catch_warnings(record=True) as told:  # SDPA says there why a backend cannot run
        warnings.simplefilter("always")
        try:
            measured = measure()
        except (torch.OutOfMemoryError, MemoryError):
            measured = {"status": "out of memory"}
        except Exception as error:
            measured = {"status": reason(error, [str(warning.message) for warning in told])}
    if device == "cuda":
        torch.cuda.empty_cache()  # standard attention can leave no room for loading a kernel
    return measured


def reason(error: Exception, told: list[str]) -> str:
    if "can't allocate memory" in str(error):  # how torch's CPU allocator puts it
        return "out of memory"
    causes = [text.split(" (Triggered internally")[0] for text in told]
    lines = [f"{type(error).__name__}: {error}".split("\n")[0], *dict.fromkeys(causes)]
    return f"cannot run: {' '.join(' '.join(lines).split())}"[:300]


def measure(case: Case, options: argparse.Namespace) -> Row:
    provider = providers.load(case.provider)
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    made = tensors(shape, case.heads_kv, options.device, options.dtype)
    *qkv, dout = map(provider.view, made)
    with_grad = case.pass_name != "fwd"
    q, k, v = (x.requires_grad_(with_grad) for x in qkv)

    def forward() -> Tensor:
        return provider.attention(q, k, v, case.causal)

    def forward_backward() -> None:
        torch.autograd.backward(forward(), dout)

    def drop_gradients() -> None:
        q.grad = k.grad = v.grad = None

    with torch.set_grad_enabled(with_grad), provider.context():
        if case.suite == "memory":
            if options.device != "cuda":
                raise NotImplementedError("peak memory is counted on CUDA only")
            return {"status": "ok", "peak_mib": f"{peak_mib(forward_backward, drop_gradients):.1f}"}
        if case.suite == "host":
            run = forward_backward if case.pass_name == "fwd_bwd" else forward
            calls, repeats = HOST_CALLS[options.device]
            times, status = host_times(run, drop_gradients, options.device, calls, repeats)
            return {"status": status, **milliseconds(times)}
        regime = REGIMES[options.regime]
        return timed(forward, dout, drop_gradients, case.flops, options.device, regime)


def timed(
    forward: Callable[[], Tensor],
    dout: Tensor,
    drop_gradients: Run,
    flops: float,
    device: str,
    regime: tuple[float, float],
) -> Row:
    """Of the forward pass where gradients are off, else of the backward pass alone."""
    out = forward()

    def backward() -> None:
        torch.autograd.backward(out, dout, retain_graph=True)

    run = backward if torch.is_grad_enabled() else forward
    times, state = device_times(run, drop_gradients, device, *regime)
    clock, power = ("", "") if state is None else (f"{state[0]}", f"{state[1]:.0f}")
    return {
        "status": "ok",
        **milliseconds(times),
        "tflops": f"{flops / quantiles(times)[1] / 1e9:.4g}",
        "sm_clock_mhz": clock,
        "power_w": power,
    }


def milliseconds(times: list[float]) -> dict[str, str]:
    names = ("p20_ms", "p50_ms", "p80_ms")
    return {name: f"{time:.5g}" for name, time in zip(names, quantiles(times), strict=True)}


def environment(options: argparse.Namespace) -> dict[str, str]:
    on_cuda = options.device == "cuda"
    cpu = f"none: CPU, {flash_attn_cuda.build_info()['cpu_isa']}, {torch.get_num_threads()} threads"
    return {
        "gpu": torch.cuda.get_device_name() if on_cuda else cpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "" if on_cuda else "",
        "version": flash_attn_cuda.__version__,
        "commit": options.commit if options.commit is not None else head_commit(),
    }


def head_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suites", nargs="+", choices=SUITES, default=["dense"], help="default: dense")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda, else cpu")
    dtypes = ("bfloat16", "float16", "float32", "float64")
    add("--dtype", choices=dtypes, help="default: bfloat16 on CUDA, float32 on the CPU")
    add("--head-dims", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    add("--seqlens", type=int, nargs="+", help="default: 512 to 16384 on CUDA, to 2048 on the CPU")
    add("--causal", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="default: both")
    add("--passes", nargs="+", choices=("fwd", "bwd"), default=["fwd", "bwd"], help="of dense")
    add("--tokens", type=int, help="batch * seqlen; default: 16384 on CUDA, 2048 on the CPU")
    add("--hidden", type=int, help="heads * head_dim; default: 2048 on CUDA, 512 on the CPU")
    add("--heads", type=int, help="default: hidden / head_dim")
    add("--heads-kv", type=int, help="heads of k and v; default: as many as of q")
    add("--providers", nargs="+", choices=providers.NAMES, help="default: all that are installed")
    add("--eager-max-seqlen", type=int, default=sys.maxsize, help="longest that eager gets")
    regimes = "burst: 0.1 s a row and provider; sustained: 1 s, the GPU at its power limit"
    add("--regime", choices=tuple(REGIMES), default="burst", help=regimes)
    add("--out", type=Path, help="default: standard output")
    add("--commit", help="what to write as commit; default: what git says")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.providers = options.providers or providers.present()
    if not options.heads and any(options.hidden % head_dim for head_dim in options.head_dims):
        parser.error(f"--hidden {options.hidden} is no multiple of every head_dim")
    return options


def write(rows: Iterable[Row], columns: tuple[str, ...], path: Path | None) -> list[Row]:
    """Row by row, so that an interrupted run leaves what it measured."""
    written = []
    with ExitStack() as stack:
        out = stack.enter_context(path.open("w", newline="")) if path else sys.stdout
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            out.flush()
            written.append(row)
    failed = sum(row["status"] != "ok" for row in written)
    if failed:
        print(f"{failed} rows are not ok: see their status", file=sys.stderr)
    return written


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    constants = environment(options)
    progress = tqdm(list(cases(options)), unit="row")

    def rows() -> Iterator[Row]:
        for case in progress:
            progress.set_postfix_str(
                f"{case.suite} {case.pass_name} {case.provider}", refresh=False
            )
            yield row(case, options) | constants

    write(rows(), COLUMNS, options.out)


if __name__ == "__main__":
    main()
