# SPDX-License-Identifier: BSD-3-Clause
"""How close do the kernels come to the error bound of tests/support/compare.py?

    python -m tests.calibrate_error_bound --out error_bound.json
    python -m tests.calibrate_error_bound --device cpu --problems 40

draws random problems from a seed, runs forward and backward, and takes |error| / bound of every
element of out, lse, dq, dk, dv and, where there is a bias, dbias:

results     by dtype, rows of the kernel table (head_dim up to the number) and result: the median,
            99th percentile and largest ratio, and the problem that has the largest
constants   the largest ratio among the elements where the term of one constant of the bound is at
            least half of it. See CALIBRATED in compare.py for where it should lie on the
            device that is the least exact; a device may read loose alone
rmse        relative root mean square errors beside those of PyTorch's flash kernel, of cuDNN's
            through PyTorch and of standard attention in the same dtype, on problems without rules,
            each on those that it can run

It stops after --problems or --seconds, whichever comes first, and fails where a ratio reaches 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import flash_attn_cuda
from flash_attn_cuda.reference import standard_attention
from tests.support.cases import DATA, Case, Inputs, make_inputs
from tests.support.compare import (
    CALIBRATED,
    CONSTANTS,
    Expected,
    error_ratio,
    expected_of,
    run,
)
from tests.support.suite import HEADS, WINDOWS

RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dslopes", "dsinks", "max_logit")
ROWS = (64, 96, 128, 192, 256, 512)  # of the kernel table
# What a case's data becomes before it is used.
#   positive: all of one sign, so that roundings that lean one way add up
#   tied: all keys but the first are equal, so that their terms are rounded alike
#   rising: keys of one direction and growing length, so that scores rise from key to key
VARIANTS = ("", "positive", "tied", "rising")
# The constants that make up one term of the bound.
TERMS: dict[str, tuple[str, ...]] = {
    "dot": ("dot_per_term", "dot"),
    "bias": ("bias",),
    "softcap": ("softcap", "derivative"),
    "dropout": ("dropout",),
    "softmax": ("exp", "lse", "sum"),
    "sum": ("sum_per_root", "sum_per_term"),
    "operand": ("operand",),
    "result": ("result",),
}
ESTIMATES = ("dot", "bias", "softcap", "dropout", "softmax", "sum")
PEERS = ("sdpa_flash", "sdpa_cudnn", "eager")
PREVAILS = 0.5
BINS = 1000
LONG_EVERY = 40


@dataclass(frozen=True)
class Limits:
    """What a device can do in time."""

    dtypes: tuple[str, ...]
    problems: int
    longest: int  # of most problems
    longest_of_all: int
    scores: int  # batch * heads * seqlen_q * seqlen_k of most problems


LIMITS = {
    "cuda": Limits(("bfloat16", "float16"), 4000, 2048, 8192, 2**24),
    "cpu": Limits(("bfloat16", "float16", "float32"), 60, 256, 1024, 2**18),
}


@dataclass(frozen=True)
class Problem:
    case: Case
    variant: str
    row: int  # of ROWS

    def __str__(self) -> str:
        fields = json.dumps(self.case.changed_fields())
        return f"{fields} {self.variant}".rstrip()

    @property
    def has_peers(self) -> bool:
        """Problems that PyTorch's attention can run too."""
        case = self.case
        return (
            case.heads == case.heads_kv
            and case.window == (-1, -1)
            and case.softmax_scale is None
            and not case.dlse
            and case.bias is None
            and case.head_dim_v is None
            and (not case.causal or case.seqlen_q == case.seqlen_k)
            and min(case.seqlen_q, case.seqlen_k) >= 16
            and case.data in ("normal", "outlier", "sparse")
            and not self.variant
        )


def draw(index: int, seed: int, device: str) -> Problem:
    """The problem of this number: dtypes and rows of the kernel table in turn, the rest random."""
    limits = LIMITS[device]
    rng = random.Random(f"{seed} {index}")
    dtype = limits.dtypes[index % len(limits.dtypes)]
    at = index // len(limits.dtypes) % len(ROWS)
    row, previous = ROWS[at], ROWS[at - 1] if at else 0
    between = rng.choice((rng.randint(previous + 1, row), rng.randrange(previous + 8, row + 1, 8)))
    is_long = index % LONG_EVERY == LONG_EVERY - 1
    plain = rng.random() < 0.25  # for the comparison with PyTorch
    longest = limits.longest_of_all if is_long else limits.longest
    seqlen_q, seqlen_k = (_length(rng, is_long, longest) for _ in range(2))
    heads, heads_kv = rng.choice(HEADS)
    batch = rng.choice((1, 1, 2, 3))
    if is_long or batch * heads * seqlen_q * seqlen_k > limits.scores:
        batch, heads, heads_kv = 1, 1, 1
    case = Case(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=row if rng.random() < 0.6 else between,
        dtype=dtype,
        causal=rng.random() < 0.4,
        seed=rng.randrange(2**31),
        deterministic=rng.random() < 0.2,
        device=device,
    )
    if plain:
        case = dataclasses.replace(
            case,
            heads_kv=heads,
            head_dim=row,
            seqlen_k=seqlen_q if case.causal else seqlen_k,
            data=rng.choice(("normal", "normal", "outlier", "sparse")),
        )
        return Problem(case, "", row)
    case = dataclasses.replace(
        case,
        data=rng.choice(("normal", "normal", "normal", *DATA)),
        dout=rng.choice(("normal", "normal", "expanded", "one_hot")),
        dlse=rng.random() < 0.3,
        window=rng.choice(WINDOWS) if rng.random() < 0.2 else (-1, -1),
    )
    if case.data not in ("large", "outlier") and rng.random() < 0.3:
        case = dataclasses.replace(
            case, softmax_scale=rng.choice((0.0, 1e-3, -0.2, 0.7, -1.0, 2.0))
        )
    if rng.random() < 0.4:
        case = dataclasses.replace(
            case,
            bias=rng.choice(("bhqk", "hqk", "bk", "hq", "")),
            bias_dtype=rng.choice((None, "float32")),
            bias_data=rng.choice(("normal", "large")),
        )
    if rng.random() < 0.1:
        case = dataclasses.replace(case, head_dim_v=rng.randint(1, row))
    variant = rng.choice(VARIANTS) if case.data in ("normal", "sparse") else ""
    return Problem(case, variant, row)


def _length(rng: random.Random, is_long: bool, longest: int) -> int:
    """As many between 1 and 2 as between 1000 and 2000, and many at the edges of tiles."""
    length = round(
        math.exp(rng.uniform(math.log(longest / 4 if is_long else 1), math.log(longest)))
    )
    if rng.random() < 0.3:
        length = math.ceil(length / 64) * 64 + rng.choice((-1, 0, 1))
    return min(length, longest)


def inputs_of(problem: Problem) -> Inputs:
    inputs = make_inputs(problem.case)
    if problem.variant == "positive":
        for x in (inputs.q, inputs.k, inputs.v):
            x.abs_()
        return dataclasses.replace(inputs, dout=inputs.dout.abs())
    if problem.variant == "tied":
        inputs.k[:, 1:] = inputs.k[:, 1:2].clone()
    if problem.variant == "rising":
        length = torch.linspace(0, 20, problem.case.seqlen_k, device=inputs.k.device)
        inputs.k.copy_(inputs.k[:, :1] * length[:, None, None])
    return inputs


def prefetched(
    problems: Iterator[Problem],
) -> Generator[tuple[Problem, Inputs], None, None]:
    """Problems with their inputs, made by threads: random numbers come from the CPU."""
    threads = ThreadPoolExecutor(max(1, min(8, torch.get_num_threads() - 1)))
    pending: deque[tuple[Problem, Future[Inputs]]] = deque()
    try:
        for problem in problems:
            pending.append((problem, threads.submit(inputs_of, problem)))
            if len(pending) > 16:
                ready, inputs = pending.popleft()
                yield ready, inputs.result()
        for ready, inputs in pending:
            yield ready, inputs.result()
    finally:
        threads.shutdown(cancel_futures=True)


@dataclass
class Ratios:
    """|error| / bound of many elements."""

    counts: Tensor  # by tenth of a percent; what is exact because nothing was rounded is left out
    largest: float = 0.0
    worst: str = ""

    def summary(self) -> dict[str, Any]:
        total = self.counts.sum().item()
        cumulative = self.counts.cumsum(0)

        def quantile(fraction: float) -> float:
            return int((cumulative < fraction * total).sum()) / BINS

        return {
            "elements": int(total),
            "p50": quantile(0.5),
            "p99": quantile(0.99),
            "max": self.largest,
            "worst": self.worst,
        }


@dataclass
class Tally:
    """What all problems so far have shown, by what the rows of a table are about."""

    device: str
    results: dict[tuple[str, int, str], Ratios] = field(default_factory=dict)
    constants: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    rmse: dict[tuple[str, int, str], list[dict[str, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    problems: int = 0

    @property
    def largest(self) -> float:
        return max((ratios.largest for ratios in self.results.values()), default=0.0)

    def add(self, problem: Problem, inputs: Inputs) -> None:
        expected = expected_of(problem.case, inputs, backward=True, constants=CONSTANTS)
        results = run(problem.case, inputs, backward=True, poisoned=False)
        actual = {name: getattr(results, name) for name in expected.values}
        ratios = {
            name: error_ratio(actual[name], expected.values[name], expected.bounds[name])
            for name in actual
        }
        for name in actual:  # what overflows the dtype is inf, rightly
            if name != "lse":
                finite = torch.finfo(actual[name].dtype).max
                largest = expected.values[name].abs() + expected.bounds[name]
                ratios[name] = ratios[name].masked_fill(largest > finite, 0.0)
        self._add_results(problem, expected, ratios)
        self._add_constants(problem, inputs, expected, ratios)
        if problem.has_peers:
            self._add_rmse(problem, inputs, expected, actual)
        self.problems += 1

    def _add_results(self, problem: Problem, expected: Expected, ratios: dict[str, Tensor]) -> None:
        largest = torch.stack([ratio.max() for ratio in ratios.values()]).tolist()
        for name, maximum in zip(ratios, largest, strict=True):
            key = (problem.case.dtype, problem.row, name)
            if key not in self.results:
                counts = torch.zeros(BINS, dtype=torch.float64, device=self.device)
                self.results[key] = Ratios(counts)
            into = self.results[key]
            exact = expected.bounds[name] == 0
            counted = ratios[name].clamp(max=1.0).masked_fill(exact, -1.0)  # outside all bins
            into.counts += torch.histc(counted, BINS, 0.0, 1.0)
            if maximum > into.largest:
                into.largest, into.worst = maximum, str(problem)

    def _add_constants(
        self, problem: Problem, inputs: Inputs, expected: Expected, ratios: dict[str, Tensor]
    ) -> None:
        found = []
        for term, names in TERMS.items():
            others = dataclasses.replace(CONSTANTS, **dict.fromkeys(names, 0.0))
            bounds = expected_of(problem.case, inputs, backward=True, constants=others).bounds
            for name in ratios:
                share = 1 - bounds[name] / expected.bounds[name]  # NaN where both are 0
                prevails = share >= PREVAILS
                largest = ratios[name].masked_fill(~prevails, 0.0).max()
                found.append((term, name, torch.stack([prevails.sum(), largest])))
        numbers = torch.stack([pair for _, _, pair in found]).tolist()
        for (term, name, _), (elements, largest) in zip(found, numbers, strict=True):
            if not elements:
                continue
            into = self.constants.setdefault(
                (problem.case.dtype, term, name), {"elements": 0, "max": 0.0, "worst": ""}
            )
            into["elements"] += int(elements)
            if largest > into["max"]:
                into |= {"max": largest, "worst": str(problem)}

    def _add_rmse(
        self, problem: Problem, inputs: Inputs, expected: Expected, actual: dict[str, Tensor]
    ) -> None:
        everyone = {"flash_attn_cuda": actual, **_peers(problem.case, inputs)}
        for name in sorted(everyone["eager"]):
            errors = {
                who: _relative_rmse(theirs[name], expected.values[name])
                for who, theirs in everyone.items()
            }
            if all(map(math.isfinite, errors.values())):
                self.rmse[problem.case.dtype, problem.row, name].append(errors)
                self.rmse[problem.case.dtype, 0, name].append(errors)


def _peers(case: Case, inputs: Inputs) -> dict[str, dict[str, Tensor]]:
    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=case.causal
            ).transpose(1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return standard_attention(q, k, v, causal=case.causal)

    attentions = {
        "sdpa_flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "eager": eager,
    }
    peers = {}
    for who in PEERS:
        q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        try:
            out = attentions[who](q, k, v)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
        except RuntimeError:  # PyTorch has no such kernel for it
            if who == "eager":
                raise
            continue
        peers[who] = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return peers


def _relative_rmse(actual: Tensor, expected: Tensor) -> float:
    error = (actual.detach().double() - expected).norm() / expected.norm()
    return float(error.item())


def report(tally: Tally, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    on_cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "kernels": flash_attn_cuda.build_info()["architectures" if on_cuda else "cpu_isa"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "version": flash_attn_cuda.__version__,
        "seed": options.seed,
        "problems": tally.problems,
        "seconds": round(seconds, 1),
        "constants_in_force": dataclasses.asdict(CONSTANTS),
        "calibrated": CALIBRATED,
        "largest_ratio": tally.largest,
        "estimates": {
            term: max(
                (f["max"] for (_, of, _), f in tally.constants.items() if of == term), default=0.0
            )
            for term in ESTIMATES
        },
        "results": [
            {"dtype": dtype, "row": row, "result": name, **ratios.summary()}
            for (dtype, row, name), ratios in sorted(tally.results.items())
        ],
        "constants": [
            {"dtype": dtype, "constant": term, "result": name, **found}
            for (dtype, term, name), found in sorted(tally.constants.items())
        ],
        "rmse": [
            {"dtype": dtype, "row": row or "all", "result": name, **_rmse_summary(errors)}
            for (dtype, row, name), errors in sorted(tally.rmse.items())
        ],
    }


def _rmse_summary(errors: list[dict[str, float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"problems": len(errors)}
    for who in ("flash_attn_cuda", *PEERS):
        theirs = sorted(error[who] for error in errors if who in error)
        if theirs:
            summary[who] = _quantiles(theirs)
        over = sorted(
            error["flash_attn_cuda"] / error[who] for error in errors if error.get(who, 0.0) > 0.0
        )
        if over and who != "flash_attn_cuda":
            summary[f"over_{who}"] = _quantiles(over)
    return summary


def _quantiles(ordered: list[float]) -> dict[str, float]:
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max": ordered[-1],
    }


def table(written: dict[str, Any]) -> Iterator[str]:
    """The report in short, one line at a time."""
    described = ("device", "torch", "version", "seed", "problems", "seconds", "largest_ratio")
    yield "  ".join(f"{name} {written[name]}" for name in described)
    yield f"\n{'|error| / bound: p50 p99 max':<30}" + "".join(f"{name:>21}" for name in RESULTS)
    rows = itertools.groupby(written["results"], key=lambda r: (r["dtype"], r["row"]))
    for (dtype, row), group in rows:
        by_name = {r["result"]: r for r in group}
        cells = (
            "  {p50:6.3f} {p99:5.3f} {max:6.3f}".format(**by_name[name])
            for name in RESULTS
            if name in by_name
        )
        yield f"{dtype:<12}{'head_dim to':>12}{row:>5} " + "".join(cells)
    low, high = CALIBRATED
    yield f"\n{'max where a constant prevails':<30}" + "".join(f"{name:>21}" for name in RESULTS)
    terms = itertools.groupby(written["constants"], key=lambda r: (r["dtype"], r["constant"]))
    for (dtype, term), group in terms:
        by_name = {r["result"]: r["max"] for r in group}
        cells = (f"{by_name[name]:21.3f}" if name in by_name else f"{'-':>21}" for name in RESULTS)
        yield f"{dtype:<12}{term:>12}      " + "".join(cells)
    for term, largest in written["estimates"].items():
        verdict = "loose" if largest < low else "tight" if largest > high else "calibrated"
        yield f"{'all':<12}{term:>12} {largest:6.3f}  {verdict}"
    names = ("flash_attn_cuda", *PEERS)
    yield f"\n{'relative RMSE, p50':<30}" + "".join(f"{name:>17}" for name in names)
    for r in (r for r in written["rmse"] if r["row"] == "all"):
        cells = (f"{r[name]['p50']:17.3g}" if name in r else f"{'-':>17}" for name in names)
        told = (
            f"  over {who}: p50 {{p50:.3f}} p99 {{p99:.3f}} max {{max:.3f}}".format(**over)
            for who in PEERS
            if who != "eager" and (over := r.get(f"over_{who}"))
        )
        yield f"{r['dtype']:<12}{r['result']:>12}      " + "".join((*cells, *told))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=tuple(LIMITS), default=device, help="default: cuda, else cpu")
    add("--problems", type=int, help="default: 4000 on CUDA, 60 on the CPU")
    add("--seconds", type=float, default=80.0, help="time to stop after; default: 80")
    add("--seed", type=int, default=0, help="default: 0")
    add("--out", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse(arguments)
    count = LIMITS[options.device].problems if options.problems is None else options.problems
    tally = Tally(options.device)
    problems = (draw(index, options.seed, options.device) for index in range(count))
    with (
        closing(prefetched(problems)) as ready,
        tqdm(total=count, unit="problem", mininterval=1) as progress,
    ):
        for problem, inputs in ready:
            tally.add(problem, inputs)
            progress.set_postfix_str(f"largest ratio {tally.largest:.3f}", refresh=False)
            progress.update()
            if time.perf_counter() - start > options.seconds:
                break
    written = report(tally, options, time.perf_counter() - start)
    if options.out:
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    print(*table(written), sep="\n")
    return int(tally.largest >= 1)


if __name__ == "__main__":
    sys.exit(main())
