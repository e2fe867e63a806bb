# SPDX-License-Identifier: BSD-3-Clause
"""Random problems, forward and backward, every element against its error bound, among NaN.

    python -m tests.fuzz --device cpu --cases 3000 --seed 1

first takes cases in which every pair of values of any two properties meets, then draws all
properties at random. A failure prints one line that repeats its case; it stops after --failures of
them, after --cases, or after --seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.support.cases import DATA, DOUTS, LAYOUTS, Case
from tests.support.compare import check
from tests.support.rules import (
    BIAS_DATA,
    DIMS,
    DOCUMENTS,
    LENGTHS,
    PADDINGS,
    RULE_LAYOUTS,
    SINKS,
)
from tests.support.suite import DTYPES, EDGES, HEADS, WINDOWS

# What each property of a case may be.
PROPERTIES: dict[str, Sequence[Any]] = {
    "dtype": DTYPES,
    "heads": HEADS,
    "head_dim": (1, 8, 16, 33, 64, 72, 128),
    "head_dim_v": (None, None, 1, 16, 40, 64, 129),
    "form": list(itertools.product(LENGTHS, ("padded", "packed"))),
    "mask_kind": ("none", "none", "causal", *WINDOWS),
    "shape": (*3 * ("any", "square"), "few queries", "few keys", "long", "empty"),
    "softmax_scale": (None, None, None, -0.2, 0.7),
    "layout": LAYOUTS,
    "data": DATA,
    "dout": DOUTS,
    "dlse": (False, True),
    "deterministic": (False, True),
    "bias": (None, None, *DIMS),
    "bias_dtype": (None, "float32", "bfloat16", "float16", "float64"),
    "bias_data": BIAS_DATA,
    "bias_grad": (True, True, False),
    "mask": (None, None, *DIMS),
    "block_mask": (None, None, "qk", "bhqk", "hq", "bk", ""),
    "density": (0.7, 0.9, 0.97, 0.2),
    "padding": PADDINGS,
    "documents": DOCUMENTS,
    "prefix": (False, True),
    "softcap": (0.0, 0.0, 1.5, 30.0),
    "alibi": ("", "", "h", "bh"),
    "sinks": SINKS,
    "dropout": (0.0, 0.0, 0.1, 0.5, 1.0),
    "max_logit": (False, True),
    "rule_layout": RULE_LAYOUTS,
}
TERMS = ("softcap", "alibi", "sinks", "dropout", "max_logit")
# How often a random property has its first value anyway: too many rules hide all pairs.
PLAIN = {
    **dict.fromkeys(("bias", "form", "head_dim_v"), 0.4),
    **dict.fromkeys(TERMS, 0.5),
    **dict.fromkeys(("mask", "block_mask", "padding", "documents", "prefix"), 0.75),
    **dict.fromkeys(("layout", "rule_layout", "data", "dout"), 0.5),
    "bias_data": 0.7,
}
MAX_SCORES = {"cpu": 2**16, "cuda": 2**20}  # of the cases, so that thousands take minutes
LONGEST = {"cpu": 300, "cuda": 1500}


def cases(device: str, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for drawn in itertools.chain(_pairwise(rng), _at_random(rng)):
        yield _case(drawn, rng, device)


def _at_random(rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        yield {
            name: values[0] if rng.random() < PLAIN.get(name, 0.0) else rng.choice(values)
            for name, values in PROPERTIES.items()
        }


def _pairwise(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Few draws in which every two values of two properties meet: one after the other, the best of
    some random ones that contain a pair that is missing."""
    values = {name: list(dict.fromkeys(some)) for name, some in PROPERTIES.items()}
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(values, 2)
        for x in range(len(values[a]))
        for y in range(len(values[b]))
    }
    while missing:
        seeds = rng.sample(sorted(missing), min(8, len(missing)))
        drawn = [
            {name: rng.randrange(len(some)) for name, some in values.items()} | dict(pair)
            for pair in seeds
        ]
        met = [set(itertools.combinations(draw.items(), 2)) & missing for draw in drawn]
        best = max(range(len(drawn)), key=lambda i: len(met[i]))
        missing -= met[best]
        yield {name: values[name][index] for name, index in drawn[best].items()}


def _case(drawn: dict[str, Any], rng: random.Random, device: str) -> Case:
    """The case of these properties, the nearest one where not all of them go together."""
    drawn = dict(drawn)
    (heads, heads_kv), (lengths, form), kind, shape = (
        drawn.pop(name) for name in ("heads", "form", "mask_kind", "shape")
    )
    is_varlen = form == "packed"
    if device == "cuda" and drawn["dtype"] == "float64":
        drawn["dtype"] = "bfloat16"
    if drawn["bias_dtype"] == "float64" and drawn["dtype"] != "float64":
        drawn["bias_dtype"] = None
    if is_varlen:
        drawn |= {"documents": "", "padding": ""}
    if drawn["layout"] == "packed":
        drawn["head_dim_v"] = None
    seqlen_q, seqlen_k = _lengths(shape, rng, LONGEST[device])
    if drawn["layout"] == "packed" or drawn["documents"] or lengths == "same":
        seqlen_k = seqlen_q
    batch = rng.choice((1, 2, 3, 5) if is_varlen else (1, 2, 3))
    while batch * heads * seqlen_q * seqlen_k > MAX_SCORES[device] and batch * heads > 1:
        batch, heads, heads_kv = max(batch // 2, 1), heads_kv, 1 if heads == heads_kv else heads_kv
    seed = rng.randrange(2**31)
    as_float32 = device == "cuda" and drawn["dtype"] == "float32"
    return Case(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=heads,
        heads_kv=heads_kv,
        varlen=is_varlen,
        lengths=lengths,
        causal=kind == "causal",
        window=kind if isinstance(kind, tuple) else (-1, -1),
        seed=seed,
        # The bound on roundings of large factors would say nothing.
        tf32=as_float32 and drawn["data"] != "large" and seed % 2 == 1,
        device=device,
        **drawn,
    )


def _lengths(shape: str, rng: random.Random, longest: int) -> tuple[int, int]:
    def length(most: int) -> int:
        """As many between 1 and 2 as between 100 and 200, and many at the edges of tiles."""
        if rng.random() < 0.3:
            return rng.choice([edge for edge in EDGES if edge <= most])
        return round(most ** rng.random())

    if shape == "square":
        return (length(longest),) * 2
    if shape == "few queries":
        return length(5), length(longest)
    if shape == "few keys":
        return length(longest), length(5)
    if shape == "long":
        return rng.randint(longest // 2, longest), rng.randint(longest // 2, longest)
    if shape == "empty":
        return rng.choice(((0, length(9)), (length(9), 0), (0, 0)))
    return length(longest), length(longest)


def shortened(case: Case) -> Case:
    """The case with all properties at their default that the failure does not need."""
    plain = Case(device=case.device)
    for name in case.changed_fields():
        simpler = dataclasses.replace(case, **{name: getattr(plain, name)})
        if failure_of(simpler) is not None and not _is_refused(simpler):
            case = simpler
    return case


def failure_of(case: Case) -> str | None:
    try:
        check(case, backward=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _is_refused(case: Case) -> bool:
    failure = failure_of(case)
    return failure is not None and not failure.startswith("AssertionError")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda, else cpu")
    add("--cases", type=int, default=3000, help="default: 3000")
    add("--seconds", type=float, default=3600.0, help="time to stop after; default: 3600")
    add("--seed", type=int, default=0, help="default: 0")
    add("--failures", type=int, default=1, help="to stop after; default: 1")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse(arguments)
    torch.set_num_threads(1)  # problems are too small for more
    failures = done = 0
    for case in itertools.islice(cases(options.device, options.seed), options.cases):
        if time.perf_counter() - start > options.seconds or failures >= options.failures:
            break
        failure = failure_of(case)
        done += 1
        if failure is not None:
            failures += 1
            print(f"{failure}\n{shortened(case).command()}", flush=True)
    print(f"{done} cases, {failures} failures, {time.perf_counter() - start:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
