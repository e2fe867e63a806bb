# SPDX-License-Identifier: BSD-3-Clause
"""Times attention against torch's own, provider by provider on the same tensors, and writes CSV.

python benchmarks/bench.py --out benchmarks/results/cpu.csv
python benchmarks/bench.py --device cuda --dtype bfloat16 --seqlens 512 2048 8192
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from tqdm import tqdm

import flash_attn_cuda
from flash_attn_cuda.reference import standard_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return flash_attn_cuda.flash_attn_func(q, k, v, causal=causal)


def sdpa_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return standard_attention(q, k, v, causal=causal)


PROVIDERS: dict[str, Attention] = {
    "flash_attn_cuda": ours,
    "sdpa_flash": sdpa_flash,
    "standard": standard,
}


def measure(run: Callable[[], object], seconds: float) -> tuple[float, float, float]:
    """Seconds of one run: the 20th, 50th and 80th percentile."""
    times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    measured = torch.tensor(
        times.blocked_autorange(min_run_time=seconds).times, dtype=torch.float64
    )
    p20, p50, p80 = torch.quantile(measured, quantiles).tolist()
    return p20, p50, p80


def environment(device: str) -> dict[str, str]:
    on_cuda = device == "cuda"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or "cpu",
        "isa": "" if on_cuda else str(flash_attn_cuda.build_info()["cpu_isa"]),
        "threads": "" if on_cuda else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "version": flash_attn_cuda.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, default=2.0, help="measured per row")
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout)
    options = parser.parse_args()

    rows = []
    cases = list(itertools.product(options.seqlens, [False, True], options.providers))
    for seqlen, causal, provider in tqdm(cases, unit="case"):
        shape = (options.batch, seqlen, options.heads, options.head_dim)
        inputs = [
            torch.randn(
                shape,
                device=options.device,
                dtype=getattr(torch, options.dtype),
                generator=torch.Generator(options.device).manual_seed(index),
            ).requires_grad_()
            for index in range(4)
        ]
        q, k, v, dout = inputs
        attention = PROVIDERS[provider]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attention(q, k, v, causal)  # noqa: B023

        out = attention(q, k, v, causal)

        def backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: B023

        flops = 4 * options.batch * options.heads * seqlen**2 * options.head_dim
        for pass_name, run, factor in (("fwd", forward, 1.0), ("bwd", backward, 2.5)):
            p20, p50, p80 = measure(run, options.seconds)
            rows.append(
                {
                    "pass": pass_name,
                    "provider": provider,
                    "causal": causal,
                    "dtype": options.dtype,
                    "batch": options.batch,
                    "seqlen": seqlen,
                    "heads": options.heads,
                    "head_dim": options.head_dim,
                    "p20_ms": f"{1e3 * p20:.3f}",
                    "p50_ms": f"{1e3 * p50:.3f}",
                    "p80_ms": f"{1e3 * p80:.3f}",
                    "tflops": f"{factor * flops * (0.5 if causal else 1.0) / p50 / 1e12:.4f}",
                    **environment(options.device),
                }
            )
    writer = csv.DictWriter(options.out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
