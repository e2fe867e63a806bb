# SPDX-License-Identifier: BSD-3-Clause
"""The low-level passes are those of autograd, and parts of attention make up the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func, lowlevel
from flash_attn_cuda.reference import attention_ref


def _qkv(seqlen: int = 60, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, seqlen, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_passes_are_those_of_autograd() -> None:
    q, k, v = _qkv()
    bias = torch.randn(2, 60, 60, dtype=torch.float64, requires_grad=True)
    options = {"causal": True, "window_size": (40, 0), "softmax_scale": 0.3}
    expected = flash_attn_func(q, k, v, attn_bias=bias, return_lse=True, **options)
    dout, dlse = (torch.randn_like(x) for x in expected)
    gradients = torch.autograd.grad(expected, (q, k, v, bias), (dout, dlse))

    out, lse = lowlevel.forward(q, k, v, attn_bias=bias, **options)
    assert not out.requires_grad
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    found = lowlevel.backward(
        dout, q, k, v, out, lse, dlse=dlse, attn_bias=bias, needs_dbias=True, **options
    )
    for got, wanted in zip((found.dq, found.dk, found.dv, found.dbias), gradients, strict=True):
        assert torch.equal(got, wanted)


def test_packed_passes_are_those_of_autograd() -> None:
    q, k, v = (x.detach()[0].requires_grad_() for x in _qkv())
    sequences = {f"cu_seqlens_{s}": torch.tensor([0, 25, 60], dtype=torch.int32) for s in "qk"}
    expected = flash_attn_varlen_func(q, k, v, **sequences, causal=True, return_lse=True)
    dout, dlse = (torch.randn_like(x) for x in expected)
    gradients = torch.autograd.grad(expected, (q, k, v), (dout, dlse))
    out, lse = lowlevel.forward(q, k, v, causal=True, **sequences)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    found = lowlevel.backward(dout, q, k, v, out, lse, dlse=dlse, causal=True, **sequences)
    assert found.dbias is None
    for got, wanted in zip((found.dq, found.dk, found.dv), gradients, strict=True):
        assert torch.equal(got, wanted)


def test_parts_of_the_keys_make_up_attention_and_its_gradients() -> None:
    """What ring attention does, of three parts, one of which no query sees."""
    q, k, v = _qkv()
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    parts = [slice(0, 25), slice(25, 40), slice(40, 60)]
    masks = [None, None, hidden]

    def options(i: int) -> dict[str, Tensor | None]:
        return {"key_padding_mask": masks[i]}

    out = torch.zeros_like(q)
    lse = torch.full((2, 2, 60), -torch.inf, dtype=torch.float64)
    for i, part in enumerate(parts):
        of_part = lowlevel.forward(q, k[:, part], v[:, part], **options(i))
        out, lse = lowlevel.merge(out, lse, *of_part)
    reference = attention_ref(q, k[:, :40], v[:, :40])
    torch.testing.assert_close((out, lse), reference, rtol=1e-12, atol=1e-12)

    dout = torch.randn_like(out)
    dq = torch.zeros_like(q)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for i, part in enumerate(parts):
        found = lowlevel.backward(
            dout, q, k[:, part], v[:, part], out.detach(), lse.detach(), **options(i)
        )
        dq += found.dq
        dk[:, part], dv[:, part] = found.dk, found.dv
    expected = torch.autograd.grad(reference[0], (q, k, v), dout)
    torch.testing.assert_close((dq, dk, dv), expected, rtol=1e-11, atol=1e-11)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    out, lse = torch.zeros(1, 3, 2, 8), torch.full((1, 2, 3), -torch.inf)
    merged = lowlevel.merge(out, lse, out, lse)
    assert torch.equal(merged[0], out)
    assert torch.equal(merged[1], lse)


@pytest.mark.parametrize("name", ["alibi", "seqlens"])
def test_an_unknown_option_is_refused(name: str) -> None:
    q, k, v = (x.detach() for x in _qkv())
    with pytest.raises(TypeError, match=rf"expected options among .*, got \['{name}'\]"):
        lowlevel.forward(q, k, v, **{name: None})
