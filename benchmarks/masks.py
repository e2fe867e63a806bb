# SPDX-License-Identifier: BSD-3-Clause
"""Times masks, biases and packed sequences beside their peers, in turn on the same tensors; as CSV.

python benchmarks/masks.py --out masks.csv
python benchmarks/masks.py --works bias window documents --providers flash_attn_cuda flex
python benchmarks/masks.py --device cpu --works mask padding --seqlen 256

varlen      16 packed causal sequences of random length, on a GPU of 64 to 4095 (37300 tokens)
bias        a bias for every head and pair, the same for all sequences: (1, heads, s, s)
mask        a random boolean mask, half of it True, the same for all heads: (1, 1, s, s)
window      causal, and no farther back than an eighth of the sequence, on a GPU 1024 keys
documents   six packed causal documents of random length in every sequence
padding     the first 30 % of every sequence's keys are padding
dropout     causal, of one pair in ten
softcap     causal, at 50
alibi       causal, with the slopes of its paper
blocks_N    a random block mask for every head, N % of it True

fwd is the forward pass without gradients, bwd the backward pass alone, and bwd_bias the same with
the gradient of the bias, which not all have. Warming up takes a quarter of --budget-ms.

TFLOP/s count 4 * head_dim forward, and 2.5 times that backward, for each pair of a query and a key
that is seen. In bias and mask that is every pair: where half of the pairs are hidden at random, no
tile is free. So a causal sequence counts half of a full one (and half its diagonal), and whoever
computes what is hidden, as SDPA does under padding, gains nothing by it. Batch and seqlen are those
of the tensors; varlen has one batch of all tokens.

flash_attn_cuda         flash_attn_func; in varlen flash_attn_varlen_func
flash_attn_cuda.varlen  flash_attn_varlen_func on documents, each a sequence of its own
flash_attn_cuda.plain   flash_attn_func without the block mask: what sparsity is to be held against
torch_varlen            torch.nn.attention.varlen, of torch 2.11 or newer
sdpa_*                  torch's SDPA with that backend, which turns a boolean mask into a bias at
                        every call; sdpa_math stores every score
flex                    torch's flex_attention; it compiles for half a minute a work, and runs only
                        where --providers names it

The table that follows the CSV has the speed of flash_attn_cuda over that of each other provider.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import bench
import torch
from timing import driver_version
from torch import Tensor
from tqdm import tqdm
from works import OURS, PLAIN, PROVIDERS_OF, SDPA, VARLEN, Problem, Work, load

COLUMNS = (
    *("suite", "work", "provider", "pass", "batch", "seqlen", "heads", "head_dim", "pairs"),
    *("dtype", "status", "p20_ms", "p50_ms", "p80_ms", "tflops", "budget_ms"),
    *("gpu", "driver", "sm_clock_mhz", "power_w", "torch", "cuda", "version", "commit"),
    "timestamp",
)
PROVIDERS = (OURS, VARLEN, PLAIN, "torch_varlen", *SDPA, "flex")
PASSES = ("fwd", "bwd", "bwd_bias")
WITH_BIAS_GRADIENT = (OURS, "sdpa_efficient", "sdpa_math")
DEFAULTS: dict[str, dict[str, object]] = {
    "cuda": {
        **{"dtype": "bfloat16", "batch": 2, "seqlen": 8192, "heads": 16, "head_dim": 128},
        "providers": [name for name in PROVIDERS if name not in ("sdpa_math", "flex")],
    },
    "cpu": {
        **{"dtype": "float32", "batch": 2, "seqlen": 1024, "heads": 4, "head_dim": 64},
        "providers": [OURS, VARLEN, PLAIN, "sdpa_math"],
    },
}


@dataclass(frozen=True)
class Case:
    """One row of the CSV, before it is measured."""

    work: str
    pass_name: str
    provider: str


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Providers in turn on each pass of each work, another one first each time."""
    for work in options.works:
        names = [name for name in PROVIDERS_OF[work] if name in options.providers]
        for index, pass_name in enumerate(options.passes):
            first = index % max(1, len(names))
            for name in names[first:] + names[:first]:
                if pass_name != "bwd_bias" or (work == "bias" and name in WITH_BIAS_GRADIENT):
                    yield Case(work, pass_name, name)


def row(case: Case, problem: Problem, options: argparse.Namespace) -> bench.Row:
    described: bench.Row = {"suite": "masks", "work": case.work, "pass": case.pass_name}
    described |= {"provider": case.provider, "dtype": problem.dtype, "budget_ms": options.budget_ms}

    def measured() -> bench.Row:
        work = load(case.work, problem)
        names = ("batch", "seqlen", "heads", "head_dim")
        described.update(zip(names, work.shape, strict=True), pairs=work.pairs)
        return measure(work, case, problem, options.budget_ms)

    found = bench.attempt(measured, problem.device)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return described | found | {"timestamp": now}


def measure(work: Work, case: Case, problem: Problem, budget_ms: float) -> bench.Row:
    provider = work.providers[case.provider]
    made = bench.tensors(work.shape, problem.heads, problem.device, problem.dtype)
    *leaves, dout = map(provider.view, made)
    q, k, v = leaves
    with_grad = case.pass_name != "fwd"
    for leaf in leaves:
        leaf.requires_grad_(with_grad)
    if work.bias is not None:
        leaves.append(work.bias.requires_grad_(case.pass_name == "bwd_bias"))

    def forward() -> Tensor:
        return provider.attention(q, k, v, work.causal)

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    flops = 4.0 * problem.head_dim * work.pairs * (2.5 if with_grad else 1.0)
    regime = (budget_ms / 4, budget_ms)
    with torch.set_grad_enabled(with_grad), provider.context():
        measured = bench.timed(forward, dout, drop_gradients, flops, problem.device, regime)
    drop_gradients()  # the bias stays, its gradient need not
    return measured


def table(rows: list[bench.Row]) -> Iterator[str]:
    """As Markdown: each row, and how much faster than it flash_attn_cuda is."""
    own = {(r["work"], r["pass"]): r for r in rows if r["provider"] == OURS}
    yield "| work | pass | provider | ms | TFLOP/s | speed of ours / its |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        cells = [r["work"], r["pass"], r["provider"], r["status"], "-", "-"]
        if r["status"] == "ok":
            cells[3:5] = r["p50_ms"], r["tflops"]
            ours = own.get((r["work"], r["pass"]))
            if ours is not None and ours["status"] == "ok" and ours is not r:
                cells[5] = f"{float(str(r['p50_ms'])) / float(str(ours['p50_ms'])):.3f}"
        yield f"| {' | '.join(map(str, cells))} |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    works = list(PROVIDERS_OF)
    add("--works", nargs="+", choices=works, default=works, help="default: all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda, else cpu")
    providers = "default: all but flex and, on CUDA, sdpa_math; on the CPU no other SDPA"
    add("--providers", nargs="+", choices=PROVIDERS, help=providers)
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: all")
    dtypes = ("bfloat16", "float16", "float32", "float64")
    add("--dtype", choices=dtypes, help="default: bfloat16 on CUDA, float32 on the CPU")
    for name in ("batch", "seqlen", "heads", "head_dim"):
        cuda, cpu = (DEFAULTS[where][name] for where in ("cuda", "cpu"))
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, help=f"default: {cuda} on CUDA, {cpu} on the CPU")
    add("--budget-ms", type=float, default=100, help="of measuring a row; default: 100")
    add("--out", type=Path, help="default: standard output")
    add("--commit", help="what to write as commit; default: what git says")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.seqlen < 8:
        parser.error(f"--seqlen {options.seqlen}: six documents need 8 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    problem = Problem(**{name.name: getattr(options, name.name) for name in fields(Problem)})
    driver = driver_version() if options.device == "cuda" else ""
    constants = bench.environment(options) | {"driver": driver}
    progress = tqdm(list(cases(options)), unit="row")
    rows = (row(case, problem, options) | constants for case in progress)
    print("\n".join(table(bench.write(rows, COLUMNS, options.out))))


if __name__ == "__main__":
    main()
