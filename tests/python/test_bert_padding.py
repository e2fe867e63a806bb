# SPDX-License-Identifier: BSD-3-Clause
"""Padded batches become packed sequences, and come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

LENGTHS = torch.tensor([5, 0, 8, 1])


def _mask(side: str) -> Tensor:
    columns = torch.arange(8)
    return (columns if side == "right" else 7 - columns) < LENGTHS[:, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_packing_and_back(side: str, dtype: torch.dtype) -> None:
    x, mask = torch.randn(4, 8, 3), _mask(side)
    tokens, indices, cu_seqlens, longest, used = unpad_input(x, mask.to(dtype))
    assert torch.equal(tokens, x[mask])
    assert torch.equal(cu_seqlens, torch.tensor([0, 5, 5, 13, 14], dtype=torch.int32))
    assert longest == 8
    assert torch.equal(used, LENGTHS.int())
    assert torch.equal(pad_input(tokens, indices, 4, 8), x * mask[..., None])


def test_unused_tokens_are_kept_but_do_not_count() -> None:
    x, mask = torch.randn(4, 8, 3), _mask("right")
    unused = torch.zeros(4, 8, dtype=torch.bool)
    unused[:, 5:7] = True
    tokens, _, cu_seqlens, _, used = unpad_input(x, mask, unused)
    assert torch.equal(tokens, x[mask | unused])
    assert torch.equal(cu_seqlens, torch.tensor([0, 7, 9, 17, 20], dtype=torch.int32))
    assert torch.equal(used, LENGTHS.int())


def test_attention_of_a_padded_batch_is_that_of_its_sequences() -> None:
    q, k, v = (torch.randn(4, 8, 2, 16, dtype=torch.float64) for _ in range(3))
    mask = _mask("left")
    tokens, indices, cu_seqlens, longest, _ = unpad_input(q, mask)
    packed = flash_attn_varlen_func(
        tokens,
        *(index_first_axis(x.flatten(0, 1), indices) for x in (k, v)),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        causal=True,
    )
    padded = flash_attn_func(q, k, v, causal=True, key_padding_mask=mask)
    expected = padded * mask[..., None, None]
    torch.testing.assert_close(pad_input(packed, indices, 4, 8), expected, rtol=1e-12, atol=1e-12)


def test_sequences_within_the_entries_of_a_batch() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0] * 6])
    x = torch.randn(3, 6, 4)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat([x[0, :5], x[1]]))
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert torch.equal(cu_seqlens, torch.tensor([0, 2, 5, 11], dtype=torch.int32))
    assert longest == 6


def test_rows_have_gradients() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 2])
    torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:3], indices, 6), x)


def test_an_empty_batch() -> None:
    tokens, _, cu_seqlens, longest, used = unpad_input(torch.zeros(0, 8, 3), torch.zeros(0, 8))
    assert tokens.shape == (0, 3)
    assert cu_seqlens.tolist() == [0]
    assert longest == 0
    assert used.shape == (0,)
