# SPDX-License-Identifier: BSD-3-Clause
"""The yardstick itself: against PyTorch's attention where the two mean the same, and by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda.reference import (
    attention_ref,
    attention_varlen_ref,
    standard_attention,
    visible_pairs,
    window_mask,
)


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


def _bernoulli(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


# What `visible_pairs` takes for batch 2, 3 heads and (seqlen_q, seqlen_k) = (150, 140).
RULES: dict[str, dict[str, Any]] = {
    "lengths": {"seqlens_q": torch.tensor([150, 7]), "seqlens_k": torch.tensor([0, 140])},
    "length_k": {"seqlens_k": torch.tensor([3, 139])},
    "prefix": {"prefix_lens": torch.tensor([0, 60])},
    "padding": {"key_padding_mask": _bernoulli(2, 140)},
    "mask": {"attn_mask": _bernoulli(2, 1, 150, 140)},
    "mask of heads and keys": {"attn_mask": _bernoulli(3, 1, 140)},
    "blocks": {"block_mask": torch.eye(2).bool() | torch.tensor([[[[False]]], [[[True]]]])},
    "blocks of queries": {"block_mask": torch.tensor([[True], [False]])},
}


@pytest.mark.parametrize("names", [*itertools.combinations(RULES, 1), tuple(RULES)[1:-1]], ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (40, 0)])
def test_a_pair_is_visible_by_the_written_rule(
    names: tuple[str, ...], window_size: tuple[int, int]
) -> None:
    rules: dict[str, Any] = {}
    for name in names:
        rules |= RULES[name]
    visible = visible_pairs(150, 140, window_size=window_size, **rules)
    visible = visible.expand(2, 3, 150, 140)
    nothing = torch.zeros(2)
    mask = rules.get("attn_mask", torch.ones(1, dtype=torch.bool)).expand(2, 3, 150, 140)
    blocks = rules.get("block_mask", torch.ones(1, dtype=torch.bool)).expand(2, 3, 2, 2)
    left, right = window_size
    for b, h, i, j in itertools.product(range(2), range(3), range(0, 150, 7), range(0, 140, 3)):
        length_q = rules.get("seqlens_q", nothing + 150)[b]
        length_k = rules.get("seqlens_k", nothing + 140)[b]
        middle = i + length_k - length_q
        shown = left < 0 or middle - left <= j <= middle + right
        shown = shown or j < rules.get("prefix_lens", nothing)[b]
        if "key_padding_mask" in rules:
            shown = shown and rules["key_padding_mask"][b, j]
        exist = i < length_q and j < length_k
        expected = exist and shown and mask[b, h, i, j] and blocks[b, h, i // 128, j // 128]
        assert visible[b, h, i, j] == bool(expected)


def test_documents_see_themselves() -> None:
    ids = torch.tensor([[5, 5, 2, 5], [0, 1, 1, -1]])
    visible = visible_pairs(4, 4, document_ids=ids)
    assert visible.shape == (2, 1, 4, 4)
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        assert visible[b, 0, i, j] == (ids[b, i] == ids[b, j])


BIAS_SHAPES = [(2, 4, 5, 11), (4, 5, 11), (2, 1, 1, 11), (1, 4, 5, 1), (5, 11), (11,), ()]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
@pytest.mark.parametrize("head_dim_v", [8, 3, 13])
def test_bias_and_mask_equal_torch(shape: tuple[int, ...], head_dim_v: int) -> None:
    q, k, v = _qkv(5, 11)
    v = torch.randn(2, 11, 4, head_dim_v, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = _bernoulli(2, 1, 5, 11)
    mask[..., 3] = True
    float_mask = torch.zeros(mask.shape).double().masked_fill(~mask, -math.inf) + bias
    expected = _torch_attention(q, k, v, float_mask.expand(2, 4, 5, 11), None)
    out, _ = attention_ref(q, k, v, attn_bias=bias, attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v, bias), dout),
        torch.autograd.grad(expected, (q, k, v, bias), dout),
        rtol=1e-11,
        atol=1e-13,
    )


def test_what_is_hidden_has_no_influence() -> None:
    q, k, v = _qkv(6, 7)
    lengths = {"seqlens_q": torch.tensor([6, 2]), "seqlens_k": torch.tensor([0, 3])}
    mask = _bernoulli(2, 4, 6, 7)
    bias = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    visible = visible_pairs(6, 7, causal=True, attn_mask=mask, **lengths)

    def results(fill: float) -> tuple[Tensor, ...]:
        x, y, z = (tensor.detach().clone() for tensor in (q, k, v))
        x[1, 2:] = y[0] = z[0] = y[1, 3:] = z[1, 3:] = fill
        leaves = [t.requires_grad_() for t in (x, y, z, bias.masked_fill(~visible, fill))]
        out, lse = attention_ref(
            *leaves[:3], attn_bias=leaves[3], causal=True, attn_mask=mask, **lengths
        )
        incoming = (torch.ones_like(out), torch.ones_like(lse))
        return out, lse, *torch.autograd.grad((out, lse), leaves, incoming)

    for with_nan, with_ones in zip(results(math.nan), results(1.0), strict=True):
        assert not with_nan.isnan().any()
        assert torch.equal(with_nan, with_ones)


def test_a_bias_of_minus_infinity_hides() -> None:
    qkv = _qkv(6, 7)
    mask = _bernoulli(2, 4, 6, 7)
    mask[0, 1, 2] = False
    bias = torch.zeros(2, 4, 6, 7).double().masked_fill(~mask, -math.inf).requires_grad_()
    by_bias, by_mask = attention_ref(*qkv, attn_bias=bias), attention_ref(*qkv, attn_mask=mask)
    for biased, masked in zip(by_bias, by_mask, strict=True):
        assert torch.equal(biased, masked)
    (dbias,) = torch.autograd.grad(by_bias[0].sum(), bias)
    assert dbias.isfinite().all()
    assert (dbias[~mask] == 0).all()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("bias_shape", [(3, 4, 5, 6), (1, 4, 1, 6), (5, 1)], ids=str)
def test_packed_sequences_are_separate_calls(used: bool, bias_shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(12, n, d, dtype=torch.float64) for n, d in ((4, 8), (2, 8), (2, 5)))
    cu_q, cu_k = torch.tensor([0, 5, 5, 9]), torch.tensor([1, 3, 9, 11])
    lengths_q, lengths_k = ([3, 0, 4], [2, 5, 0]) if used else ([5, 0, 4], [2, 6, 2])
    rules: dict[str, Any] = {"softmax_scale": 0.4, "window_size": (3, 1)}
    if used:
        rules |= {"seqused_q": torch.tensor(lengths_q), "seqused_k": torch.tensor(lengths_k)}
    bias = torch.randn(bias_shape, dtype=torch.float64)
    mask = _bernoulli(3, 1, 5, 6)
    prefix = torch.tensor([1, 2, 0])
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    out, lse = attention_varlen_ref(
        *leaves[:3], cu_q, cu_k, attn_bias=bias, attn_mask=mask, prefix_lens=prefix, **rules
    )
    full_bias, inside = bias.expand(3, 4, 5, 6), torch.zeros(12, dtype=torch.bool)
    for b in range(3):
        of_q = slice(int(cu_q[b]), int(cu_q[b]) + lengths_q[b])
        of_k = slice(int(cu_k[b]), int(cu_k[b]) + lengths_k[b])
        one_out, one_lse = attention_ref(
            *(x[None] for x in (q[of_q], k[of_k], v[of_k])),
            attn_bias=full_bias[b, :, : lengths_q[b], : lengths_k[b]],
            attn_mask=mask[b, :, : lengths_q[b], : lengths_k[b]],
            prefix_lens=prefix[b : b + 1],
            softmax_scale=0.4,
            window_size=(3, 1),
        )
        assert torch.equal(out[of_q], one_out[0])
        assert torch.equal(lse[:, of_q], one_lse[0])
        inside[of_q] = True
    assert (out[~inside] == 0).all()
    assert (lse[:, ~inside] == -math.inf).all()
    dq = torch.autograd.grad(out.sum(), leaves)[0]
    assert (dq[~inside] == 0).all()


def test_gradcheck_of_a_bias_and_masks() -> None:
    qkv = tuple(x[:1, :, :2, :3].detach().requires_grad_() for x in _qkv(4, 5))
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    mask = _bernoulli(4, 5)
    mask[:, 2] = True
    assert torch.autograd.gradcheck(
        lambda *x: attention_ref(*x[:3], attn_bias=x[3], attn_mask=mask), (*qkv, bias)
    )


def test_gradcheck() -> None:
    qkv = tuple(x[:1, :, :2, :3].detach().requires_grad_() for x in _qkv(4, 5))
    assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, causal=True), qkv)


def test_dtypes() -> None:
    q, k, v = (x.detach().bfloat16() for x in _qkv())
    assert [x.dtype for x in attention_ref(q, k, v)] == [torch.float64] * 2
    assert [x.dtype for x in attention_ref(q, k, v, upcast=torch.float32)] == [torch.float32] * 2
    assert standard_attention(q, k, v).dtype == torch.bfloat16
