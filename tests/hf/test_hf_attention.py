# SPDX-License-Identifier: BSD-3-Clause
"""The attention of one layer: arguments that few models pass, and those that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn_cuda.hf._attention import attention

BATCH, HEADS, SEQLEN, HEAD_DIM = 2, 4, 10, 16


class Layer(nn.Module):
    is_causal = True


def _qkv(*dtypes: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((BATCH, HEADS, SEQLEN, HEAD_DIM), *2 * ((BATCH, 2, SEQLEN, HEAD_DIM),))
    q, k, v = (torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return q, k, v


def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    out, probabilities = attention(Layer(), q, k, v, mask, **options)
    assert probabilities is None
    assert out.shape == (BATCH, SEQLEN, HEADS, HEAD_DIM)
    return out


FLOATS = (torch.float32, torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(HEADS, 1, 1), (1, HEADS, 1, 1), (BATCH, HEADS, 1, 1)])
def test_a_factor_for_each_head(shape: tuple[int, ...]) -> None:
    q, k, v = _qkv(*FLOATS)
    factor = torch.rand(shape)
    out = _run(q, k, v, head_mask=factor)
    each = factor.expand(BATCH, HEADS, 1, 1).transpose(1, 2)
    torch.testing.assert_close(out, _run(q, k, v) * each)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_mixed_dtypes_become_the_16_bit_one(dtypes: tuple[torch.dtype, ...]) -> None:
    q, k, v = _qkv(*dtypes)
    expected = _run(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert expected.dtype is torch.bfloat16
    assert torch.equal(_run(q, k, v), expected)


def test_autocast_decides_where_it_is_on() -> None:
    q, k, v = _qkv(*FLOATS)
    with torch.autocast("cpu", torch.bfloat16):
        assert _run(q, k, v).dtype is torch.bfloat16


def test_the_argument_is_causal_overrides_the_layer() -> None:
    q, k, v = _qkv(*FLOATS)
    full = _run(q, k, v, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(full, expected.transpose(1, 2))
    assert not torch.allclose(full, _run(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_windows(causal: bool) -> None:
    q, k, v = _qkv(*FLOATS)
    rows = torch.arange(SEQLEN)
    distance = rows[:, None] - rows
    seen = distance < 3 if causal else distance.abs() < 3
    seen = seen & (distance >= 0) if causal else seen
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    )
    out = _run(q, k, v, is_causal=causal, sliding_window=3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_bias_beside_each_kind_of_mask() -> None:
    q, k, v = _qkv(*FLOATS)
    bias = torch.randn(1, HEADS, SEQLEN, SEQLEN + 3, requires_grad=True)  # longer: of a cache
    exists = torch.rand(BATCH, SEQLEN) < 0.7
    exists[:, 0] = True
    triangle = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()
    pairs = (triangle & exists[:, None, None, :]).expand(BATCH, 1, SEQLEN, SEQLEN)
    added = torch.zeros(pairs.shape).masked_fill(~pairs, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias[..., :SEQLEN] + added, enable_gqa=True
    ).transpose(1, 2)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), bias)
    for mask in (exists, pairs, added):
        out = _run(q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(out, expected)
        (got,) = torch.autograd.grad((out * weights).sum(), bias)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "output_attentions: expected False, got True", {"output_attentions": True}),
        (NotImplementedError, "indices: fa_cuda has no", {"indices": torch.zeros(1)}),
        (NotImplementedError, "block_indices: fa_cuda has no", {"block_indices": torch.zeros(1)}),
        (NotImplementedError, "sinks: fa_cuda has no", {"sinks": torch.zeros(1)}),
        (
            NotImplementedError,
            r"head_mask: .*got shape \(4, 10, 10\)",
            {"head_mask": torch.ones(4, 10, 10)},
        ),
        (ValueError, "cu_seq_lens_k: expected a tensor", {"cu_seq_lens_q": torch.tensor([0, 20])}),
        (
            NotImplementedError,
            "attention_mask: fa_cuda has none for sequences packed",
            {
                "mask": torch.ones(2, 10, dtype=torch.bool),
                "cu_seq_lens_q": torch.tensor([0, 20]),
                "cu_seq_lens_k": torch.tensor([0, 20]),
            },
        ),
        (ValueError, r"attention_mask: .*got shape \(2, 1, 10\)", {"mask": torch.ones(2, 1, 10)}),
        (
            NotImplementedError,
            "position_bias: fa_cuda has none for sequences packed",
            {
                "position_bias": torch.zeros(1, 1, 10, 10),
                "cu_seq_lens_q": torch.tensor([0, 20]),
                "cu_seq_lens_k": torch.tensor([0, 20]),
            },
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_refuses(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{message}"):
        _run(*_qkv(*FLOATS), **options)


def test_what_it_does_not_know_is_left_alone() -> None:
    q, k, v = _qkv(*FLOATS)
    assert torch.equal(_run(q, k, v, use_cache=True, router_logits=None), _run(q, k, v))
