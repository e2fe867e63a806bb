# SPDX-License-Identifier: BSD-3-Clause
"""Sizes that 32 bits do not count: elements of a tensor, pairs of a bias, and heads of a batch.

The reference cannot hold such a problem, so all but a few queries, or all but a few keys, are made
to have no influence at all: a query by a gradient of 0, a key by a score that the softmax turns
into 0. The few, which lie around every limit, then make up a small problem.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func
from tests.support.compare import assert_within_bound, expected_with_bounds

HEADS = 16
SHORT = 100
GIB_NEEDED = 60
NAMES = ("out", "lse", "dq", "dk", "dv")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < GIB_NEEDED << 30:
        pytest.skip(f"needs {GIB_NEEDED} GiB of free memory")
    yield
    torch.cuda.empty_cache()


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _long(head_dim: int) -> tuple[int, Tensor]:
    """A length that makes 2^31 elements and some more, and rows around what integers hold."""
    row = HEADS * head_dim
    length = 2**31 // row + 1000
    limits = (2**29 // row, 2**30 // row, 2**31 // row)  # 2^31 and 2^32 bytes, 2^31 elements
    rows = [0, 1, *(limit + i for limit in limits for i in range(-4, 4)), length - 2, length - 1]
    return length, torch.tensor(rows, device="cuda")


def _step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **arguments: bool) -> dict[str, Tensor]:
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = flash_attn_func(q, k, v, return_lse=True, **arguments)
    results = (out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout))
    return dict(zip(NAMES, results, strict=True))


def _check(
    results: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool = False
) -> None:
    expected = expected_with_bounds(*(x.detach() for x in (q, k, v, dout)), causal=causal)
    for name in NAMES:
        assert_within_bound(name, results[name], expected.values[name], expected.bounds[name])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16)],
    ids=str,
)
def test_queries_past_two_to_the_31_elements(head_dim: int, dtype: torch.dtype) -> None:
    length, rows = _long(head_dim)
    q = _normal(1, length, HEADS, head_dim, dtype=dtype)
    k, v = _normal(2, 1, SHORT, HEADS // 2, head_dim, dtype=dtype)
    dout = torch.zeros_like(q)
    dout[:, rows] = _normal(1, len(rows), HEADS, head_dim, dtype=dtype)
    results = _step(q, k, v, dout)
    assert results["out"].isfinite().all()
    few = {name: results[name][:, rows] for name in ("out", "dq")}
    few["lse"] = results["lse"][..., rows]
    _check(results | few, q[:, rows], k, v, dout[:, rows])
    results["dq"][:, rows] = 0
    assert not results["dq"].any()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_past_two_to_the_31_elements(head_dim: int, deterministic: bool) -> None:
    length, rows = _long(head_dim)
    q = _normal(1, SHORT, HEADS, head_dim)
    k, v = (_normal(1, length, HEADS, head_dim) for _ in range(2))
    dout = _normal(1, SHORT, HEADS, head_dim)
    q[..., 0] = 16
    few_k = k[:, rows]
    k[..., 0] = -(2.0**14)
    k[:, rows] = few_k
    results = _step(q, k, v, dout, deterministic=deterministic)
    few = {name: results[name][:, rows] for name in ("dk", "dv")}
    _check(results | few, q, few_k, v[:, rows], dout)
    for name in ("dk", "dv"):
        results[name][:, rows] = 0
        assert not results[name].any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_pairs_past_two_to_the_31(head_dim: int) -> None:
    length = 12_000
    rows = torch.tensor([0, 1, length // 2, length - 2, length - 1], device="cuda")
    q, k, v = (_normal(1, length, HEADS, head_dim).requires_grad_() for _ in range(3))
    bias = _normal(1, HEADS, length, length).requires_grad_()
    mask = torch.empty(bias.shape, dtype=torch.bool, device="cuda").bernoulli_(0.7)
    assert bias.numel() > 2**31
    dout = torch.zeros_like(q)
    dout[:, rows] = _normal(1, len(rows), HEADS, head_dim)
    out, lse = flash_attn_func(q, k, v, attn_bias=bias, attn_mask=mask, return_lse=True)
    dq, dk, dv, dbias = torch.autograd.grad(out, (q, k, v, bias), dout)
    expected = expected_with_bounds(
        *(x.detach() for x in (q[:, rows], k, v, dout[:, rows])),
        attn_bias=bias[:, :, rows],
        attn_mask=mask[:, :, rows],
    )
    few = {"out": out[:, rows], "lse": lse[..., rows], "dq": dq[:, rows], "dk": dk, "dv": dv}
    for name, result in (few | {"dbias": dbias[:, :, rows]}).items():
        assert_within_bound(name, result, expected.values[name], expected.bounds[name])
    dq[:, rows] = 0
    dbias[:, :, rows] = 0
    assert not dq.any()
    assert not dbias.any()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads"),
    [(70_000, 2), (1, 70_000), (1_100, 1_000)],  # the last takes more than one launch
)
def test_more_heads_than_a_grid_has_rows(batch: int, heads: int, deterministic: bool) -> None:
    seqlen_q, seqlen_k, head_dim = 5, 7, 64
    q, dout = (_normal(batch, seqlen_q, heads, head_dim) for _ in range(2))
    k, v = (_normal(batch, seqlen_k, heads // 2, head_dim) for _ in range(2))
    results = _step(q, k, v, dout, causal=True, deterministic=deterministic)
    step = max(1, 100_000 // heads)  # at a time
    for start in range(0, batch, step):
        some = slice(start, start + step)
        _check(
            {name: result[some] for name, result in results.items()},
            *(x[some] for x in (q, k, v, dout)),
            causal=True,
        )
