# SPDX-License-Identifier: BSD-3-Clause
"""torch.autocast: the computation in its dtype, whatever mixture comes in; gradients in the inputs'
own dtypes; in eager mode and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import explain, flash_attn_func, flash_attn_varlen_func

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
AUTOCAST = [
    ("cpu", bf16),
    ("cpu", fp16),
    pytest.param("cuda", bf16, marks=pytest.mark.gpu),
    pytest.param("cuda", fp16, marks=pytest.mark.gpu),
]
on_dtypes = pytest.mark.parametrize(("device", "dtype"), AUTOCAST, ids=str)
# q and k in float32 come from a rotary embedding, v from a layer under autocast.
MIXTURES = [(fp32, fp32, fp32), (fp32, fp32, bf16), (bf16, bf16, bf16), (fp16, fp32, bf16)]


def _padded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, sinks=bias[0, :2], deterministic=True)


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, attn_bias=bias, sinks=bias[:2, 0], deterministic=True)


def _packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    first_rows = torch.tensor([0, 30, 140], device=q.device, dtype=torch.int32)
    rows = (first_rows, first_rows)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, *rows, alibi_slopes=bias[:2, 0], deterministic=True)


ATTENTION = [_padded, _biased, _packed]


def _qkv(device: str, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [torch.randn(2, 70, 2, 16, device=device).to(dtype).requires_grad_() for dtype in dtypes]


@on_dtypes
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("compiled", [False, True])
def test_results_are_those_of_cast_inputs(
    device: str,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    attention: Callable[..., Tensor],
    compiled: bool,
) -> None:
    bias = torch.randn(70, 70, device=device, requires_grad=True)
    inputs = [*_qkv(device, dtypes), bias]

    def under_autocast(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return attention(*inputs)

    if compiled:
        torch._dynamo.reset()
        under_autocast = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)
    out = under_autocast(*inputs)
    expected = attention(*(x.to(dtype) for x in inputs[:3]), bias)
    assert expected.dtype == dtype
    results = [(x, *torch.autograd.grad(x, inputs, torch.ones_like(x))) for x in (out, expected)]
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert [x.dtype for x in results[0][1:]] == [*dtypes, fp32]


@on_dtypes
@pytest.mark.parametrize("compiled", [False, True])
def test_a_nested_region_without_autocast(device: str, dtype: torch.dtype, compiled: bool) -> None:
    qkv = _qkv(device, (fp32, fp32, fp32))

    def attention(*qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, dtype):
            inside = flash_attn_func(*qkv)
            with torch.autocast(device, enabled=False):
                nested = flash_attn_func(*qkv)
            return inside, nested, flash_attn_func(*qkv)

    if compiled:
        torch._dynamo.reset()
        attention = torch.compile(attention, backend="aot_eager", fullgraph=True)
    inside, nested, after = attention(*qkv)
    assert [x.dtype for x in (inside, nested, after)] == [dtype, fp32, dtype]
    assert torch.equal(nested, flash_attn_func(*qkv))
    assert torch.equal(inside, after)


@pytest.mark.gpu
def test_the_autocast_of_another_device_casts_nothing() -> None:
    qkv = _qkv("cpu", (fp32, fp32, fp32))
    with torch.autocast("cuda", bf16):
        assert flash_attn_func(*qkv).dtype == fp32


def test_float64_is_not_cast() -> None:
    qkv = _qkv("cpu", (fp64, fp64, fp64))
    expected = flash_attn_func(*qkv)
    with torch.autocast("cpu", bf16):
        assert torch.equal(flash_attn_func(*qkv), expected)


def test_a_mixture_without_autocast_is_refused(device: str) -> None:
    with pytest.raises(TypeError, match="v: expected float32 like q, got bfloat16"):
        flash_attn_func(*_qkv(device, (fp32, fp32, bf16)))


@on_dtypes
def test_explain_tells_of_the_cast_tensors(device: str, dtype: torch.dtype) -> None:
    expected = explain(*_qkv(device, (dtype, dtype, dtype)))
    with torch.autocast(device, dtype):
        assert explain(*_qkv(device, (fp32, fp32, bf16))) == expected
