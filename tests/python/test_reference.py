# SPDX-License-Identifier: BSD-3-Clause
"""The yardstick itself: against PyTorch's attention where the two mean the same, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda.reference import attention_ref, standard_attention, window_mask


def _qkv(
    seqlen_q: int = 9, seqlen_k: int = 9, heads: int = 4, heads_kv: int = 4
) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(2, seqlen, n, 8, dtype=torch.float64, requires_grad=True)
        for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    )


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    transposed = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(
        *transposed, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize(
    "attention", [lambda *a, **k: attention_ref(*a, **k)[0], standard_attention]
)
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "mask"),
    [
        (9, 9, {}),
        (5, 11, {"causal": True}),
        (9, 9, {"window_size": (2, 1)}),
        (5, 11, {"window_size": (3, -1), "causal": True}),
        (9, 9, {"softmax_scale": -0.7}),
    ],
)
def test_equals_torch(attention, heads_kv: int, seqlen_q: int, seqlen_k: int, mask: dict) -> None:
    qkv = _qkv(seqlen_q, seqlen_k, heads_kv=heads_kv)
    scale = mask.get("softmax_scale")
    visible = {name: value for name, value in mask.items() if name != "softmax_scale"}
    expected = _torch_attention(*qkv, window_mask(seqlen_q, seqlen_k, **visible), scale)
    out = attention(*qkv, **mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, dout),
        torch.autograd.grad(expected, qkv, dout),
        rtol=1e-11,
        atol=1e-13,
    )


@pytest.mark.parametrize("seqlen_q", range(6))
@pytest.mark.parametrize("seqlen_k", range(6))
def test_mask_is_the_written_rule(seqlen_q: int, seqlen_k: int) -> None:
    offset = seqlen_k - seqlen_q
    for left in (-1, 0, 2, 9):
        for right in (-1, 0, 1, 9):
            mask = window_mask(seqlen_q, seqlen_k, window_size=(left, right))
            for i in range(seqlen_q):
                for j in range(seqlen_k):
                    after_left = left == -1 or i + offset - left <= j
                    before_right = right == -1 or j <= i + offset + right
                    assert mask[i, j] == (after_left and before_right)


def test_causal_is_a_right_side_of_zero() -> None:
    causal = window_mask(4, 6, causal=True, window_size=(2, 5))
    assert torch.equal(causal, window_mask(4, 6, window_size=(2, 0)))
    assert causal[-1, -1]


def test_lse_is_the_logarithm_of_the_denominator() -> None:
    q, k, v = _qkv()
    _, lse = attention_ref(q, k, v, softmax_scale=0.3)
    expected = torch.exp(0.3 * torch.einsum("bqhd,bkhd->bhqk", q, k)).sum(-1).log()
    torch.testing.assert_close(lse, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 3), (4, 0), (0, 4), (1, 1)])
def test_masked_rows_are_zero_and_nothing_is_nan(seqlen_q: int, seqlen_k: int) -> None:
    qkv = _qkv(seqlen_q, seqlen_k, heads_kv=2)
    out, lse = attention_ref(*qkv, causal=True)
    unseeing = max(seqlen_q - seqlen_k, 0)
    assert (out[:, :unseeing] == 0).all()
    assert (lse[..., :unseeing] == -math.inf).all()
    assert lse[..., unseeing:].isfinite().all()
    gradients = torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), torch.ones_like(lse)))
    assert (gradients[0][:, :unseeing] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradcheck() -> None:
    qkv = tuple(x[:1, :, :2, :3].detach().requires_grad_() for x in _qkv(4, 5))
    assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, causal=True), qkv)


def test_dtypes() -> None:
    q, k, v = (x.detach().bfloat16() for x in _qkv())
    assert [x.dtype for x in attention_ref(q, k, v)] == [torch.float64] * 2
    assert [x.dtype for x in attention_ref(q, k, v, upcast=torch.float32)] == [torch.float32] * 2
    assert standard_attention(q, k, v).dtype == torch.bfloat16
