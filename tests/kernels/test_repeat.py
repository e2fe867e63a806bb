# SPDX-License-Identifier: BSD-3-Clause
"""The same call again, while the GPU has other work too: the same bits, where they are promised."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func
from tests.support.cases import Case, Inputs, make_inputs
from tests.support.compare import (
    assert_bitwise_equal,
    assert_within_bound,
    expected_with_bounds,
    run,
)

pytestmark = pytest.mark.gpu

NAMES = ("out", "lse", "dq", "dk", "dv")
NOISE = 4096  # rows and columns of a product that fills the GPU for a fraction of a millisecond

CASES = [
    Case(
        batch=1,
        seqlen_q=1000,
        seqlen_k=1100,
        heads=8,
        heads_kv=2,
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        device="cuda",
    )
    for head_dim in (64, 96, 128, 192, 256, 512)
    for dtype in ("bfloat16", "float16")
    for causal in (False, True)
    if dtype == "bfloat16" or head_dim == 64
]
# Several times as many blocks as a GPU holds at once, so that blocks begin, and wait for their turn
# to add to dq, while others are still to begin.
MANY_BLOCKS = [
    dataclasses.replace(case, batch=16, heads_kv=4)
    for case in CASES
    if case.causal and case.dtype == "bfloat16"
]

# Tiles of queries and keys by the dozen, in all of which pairs are hidden; and of keys in all heads
# more than twice as many as a GPU has multiprocessors, so that blocks take one after the other.
RULES: list[dict[str, Any]] = [
    {"bias": "qk", "window": (1000, 1000)},
    {"bias": "hqk", "bias_dtype": "float32", "documents": "shuffled"},
    {"mask": "hqk", "density": 0.7, "causal": True},
    {"documents": "runs", "causal": True},
    {"prefix": True, "window": (300, 0)},
    {"padding": "left", "documents": "runs", "prefix": True, "causal": True},
]
RULED = [
    Case(
        batch=7,
        seqlen_q=1240,
        seqlen_k=1240,
        heads=8,
        heads_kv=4,
        head_dim=head_dim,
        dtype="bfloat16",
        deterministic=True,
        device="cuda",
        **rules,
    )
    for head_dim in (64, 128, 192, 256)
    for rules in RULES
]


def _step(case: Case, inputs: Inputs, *, deterministic: bool = False) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = flash_attn_func(
        q, k, v, deterministic=deterministic, return_lse=True, **case.mask_arguments
    )
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout)


@pytest.fixture
def make_noise() -> Iterator[Callable[[], None]]:
    """Gives another stream more work, of ever different extent."""
    stream = torch.cuda.Stream()
    factor = torch.randn(NOISE, NOISE, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    stream.wait_stream(torch.cuda.current_stream())
    choice = random.Random(0).choice

    def make() -> None:
        rows = choice((64, 256, 512, NOISE // 2, NOISE))
        with torch.cuda.stream(stream):
            torch.mm(factor[:rows], factor, out=product[:rows])

    yield make
    stream.synchronize()


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return (a.view(torch.int16) != b.view(torch.int16)).any()


@pytest.mark.parametrize(
    ("case", "repeats"),
    [(case, 1000) for case in CASES] + [(case, 50) for case in MANY_BLOCKS],
    ids=str,
)
def test_deterministic_results_are_the_same_bits_every_time(
    case: Case, repeats: int, make_noise: Callable[[], None]
) -> None:
    inputs = make_inputs(case)
    first = _step(case, inputs, deterministic=True)
    differ = torch.zeros(len(NAMES), dtype=torch.bool, device="cuda")  # read at the end alone
    for _ in range(repeats):
        make_noise()
        again = _step(case, inputs, deterministic=True)
        differ |= torch.stack(list(map(_differ, again, first)))
    assert not differ.any(), dict(zip(NAMES, differ.tolist(), strict=True))


@pytest.mark.parametrize("case", RULED, ids=str)
def test_results_under_rules_are_the_same_bits_every_time(
    case: Case, make_noise: Callable[[], None]
) -> None:
    inputs = make_inputs(case)
    first = _results(case, inputs)
    differ = torch.zeros(len(first), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        make_noise()
        differ |= torch.stack(list(map(_differ, _results(case, inputs).values(), first.values())))
    assert not differ.any(), dict(zip(first, differ.tolist(), strict=True))


def _results(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    found = vars(run(case, inputs, backward=True, poisoned=False))
    return {name: result.detach() for name, result in found.items() if result is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_setting_means_the_same(case: Case) -> None:
    inputs = make_inputs(case)
    by_argument = _step(case, inputs, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        by_setting = _step(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, actual, expected in zip(NAMES, by_setting, by_argument, strict=True):
        assert_bitwise_equal(name, actual, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_default_all_but_dq_are_the_same_bits(
    case: Case, make_noise: Callable[[], None]
) -> None:
    inputs = make_inputs(case)
    expected = expected_with_bounds(
        inputs.q, inputs.k, inputs.v, inputs.dout, **case.mask_arguments
    )
    first = _step(case, inputs)
    for _ in range(30):
        make_noise()
        for name, actual, once in zip(NAMES, _step(case, inputs), first, strict=True):
            if name == "dq":
                assert_within_bound(name, actual, expected.values[name], expected.bounds[name])
            else:
                assert_bitwise_equal(name, actual, once)


PRINT_DIGESTS = """
import hashlib

import torch

from tests.kernels.test_repeat import CASES, _step
from tests.support.cases import make_inputs

for case in CASES:
    results = _step(case, make_inputs(case), deterministic=True)
    digest = hashlib.sha256()
    for x in results:
        digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    print(case, digest.hexdigest())
"""


def test_deterministic_results_are_the_same_bits_in_every_process() -> None:
    def digests() -> list[str]:
        command = [sys.executable, "-c", PRINT_DIGESTS]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    first, second = digests(), digests()
    assert len(first) == len(CASES)
    assert first == second
