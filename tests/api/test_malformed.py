# SPDX-License-Identifier: BSD-3-Clause
"""Lengths, biases and masks that make no sense: on the CPU each is refused, by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func

BATCH, SEQLEN_Q, SEQLEN_K, HEADS = 2, 130, 140, 4
LONG = 2**31 - 1


def _integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _qkv(seqlen_q: int = SEQLEN_Q, seqlen_k: int = SEQLEN_K) -> list[Tensor]:
    return [torch.randn(BATCH, seqlen, HEADS, 16) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]


# What a padded call is refused for: the argument, its value, the exception, what is said.
DENSE = [
    ("seqlens_q", _integers(-1, 5), ValueError, r"from 0 to the 130 rows of sequence 0, got -1"),
    ("seqlens_q", _integers(5, 131), ValueError, r"from 0 to the 130 rows of sequence 1, got 131"),
    ("seqlens_k", _integers(140, LONG), ValueError, r"from 0 to the 140 rows .*, got 2147483647"),
    ("seqlens_k", _integers(-LONG, 3), ValueError, r"from 0 .*, got -2147483647"),
    ("seqlens_q", _integers(5), ValueError, r"got \(1,\)"),
    ("seqlens_k", _integers(5, 5, 5), ValueError, r"got \(3,\)"),
    ("seqlens_q", torch.tensor([5, 5]), TypeError, r"int32"),
    ("seqlens_k", torch.tensor([5.0, 5.0]), TypeError, r"int32"),
    ("prefix_lens", _integers(3, -1), ValueError, r"expected 0 or more keys, got -1 at index 1"),
    ("prefix_lens", _integers(3), ValueError, r"got \(1,\)"),
    ("prefix_lens", torch.tensor([5, 5]), TypeError, r"int32"),
    ("document_ids", torch.zeros(BATCH, SEQLEN_Q).int(), ValueError, r"130 and 140"),
    ("key_padding_mask", _mask(BATCH, SEQLEN_Q), ValueError, r"got \(2, 130\)"),
    ("key_padding_mask", _mask(1, SEQLEN_K), ValueError, r"got \(1, 140\)"),
    ("key_padding_mask", torch.ones(BATCH, SEQLEN_K), TypeError, r"expected bool"),
    ("attn_mask", _mask(BATCH, HEADS, SEQLEN_K, SEQLEN_Q), ValueError, r"\(2, 4, 130, 140\), got"),
    ("attn_mask", _mask(3, 1, 1, 1), ValueError, r"broadcasts to .*got \(3, 1, 1, 1\)"),
    ("attn_mask", _mask(1, 1, 1, 1, 1), ValueError, r"broadcasts to"),
    ("attn_mask", torch.ones(SEQLEN_Q, SEQLEN_K), TypeError, r"expected bool"),
    ("block_mask", _mask(2, 3), ValueError, r"broadcasts to \(2, 4, 2, 2\), got \(2, 3\)"),
    ("block_mask", _mask(SEQLEN_Q, SEQLEN_K), ValueError, r"broadcasts to \(2, 4, 2, 2\), got"),
    ("block_mask", torch.ones(2, 2).int(), TypeError, r"expected bool"),
    ("attn_bias", torch.zeros(2, SEQLEN_Q, SEQLEN_K), ValueError, r"broadcasts to .*, got \(2, 13"),
    ("attn_bias", torch.zeros(SEQLEN_K + 1), ValueError, r"broadcasts to .*, got \(141,\)"),
    ("attn_bias", torch.zeros(SEQLEN_K).int(), TypeError, r"float32"),
    ("attn_bias", torch.zeros(SEQLEN_K).double(), TypeError, r"got float64"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), DENSE)
def test_of_padded_sequences(
    name: str, value: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        flash_attn_func(*_qkv(), **{name: value})


@pytest.mark.parametrize("shape", [(2, 129), (1, 130), (130,), (2, 130, 1)], ids=str)
def test_shapes_of_documents(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^document_ids: expected "):
        flash_attn_func(*_qkv(130, 130), document_ids=torch.zeros(shape, dtype=torch.int32))


GOOD: dict[str, Any] = {
    "cu_seqlens_q": _integers(0, 130, 260),
    "cu_seqlens_k": _integers(0, 9, 280),
}
PACKED = [
    ("cu_seqlens_q", _integers(0, 140, 130), ValueError, r"never decrease.*got 130 after 140"),
    ("cu_seqlens_q", _integers(-1, 140, 260), ValueError, r"got -1 after 0 at index 0"),
    ("cu_seqlens_q", _integers(0, 140, 261), ValueError, r"260 rows of q, got 261"),
    ("cu_seqlens_k", _integers(0, LONG, 280), ValueError, r"280 rows of k, got 2147483647"),
    ("cu_seqlens_k", _integers(0, -LONG, 280), ValueError, r"got -2147483647 after 0 at index 1"),
    ("cu_seqlens_k", _integers(0, 280), ValueError, r"got \(2,\)"),
    ("cu_seqlens_q", _integers(), ValueError, r"\(batch \+ 1,\), got \(0,\)"),
    ("cu_seqlens_q", _integers(0, 130, 260)[None], ValueError, r"\(batch \+ 1,\), got \(1, 3\)"),
    ("cu_seqlens_q", torch.tensor([0, 130, 260]), TypeError, r"int32"),
    ("cu_seqlens_q", None, TypeError, r"expected a torch.Tensor"),
    ("seqused_q", _integers(131, 0), ValueError, r"from 0 to the 130 rows of sequence 0, got 131"),
    ("seqused_k", _integers(0, -1), ValueError, r"from 0 to the 271 rows of sequence 1, got -1"),
    ("seqused_k", _integers(1), ValueError, r"got \(1,\)"),
    ("seqused_k", torch.tensor([1, 1]), TypeError, r"int32"),
    ("prefix_lens", _integers(-2, 0), ValueError, r"got -2 at index 0"),
    ("prefix_lens", _integers(1, 1, 1), ValueError, r"got \(3,\)"),
    ("attn_mask", _mask(3, 1, 1, 271), ValueError, r"broadcasts to .*got \(3, 1, 1, 271\)"),
    ("attn_bias", torch.zeros(3, 1, 1), ValueError, r"broadcasts to .*got \(3, 1, 1\)"),
    ("block_mask", torch.ones(2, 3), TypeError, r"expected bool"),
]


def _call_packed(**arguments: Any) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in _qkv())
    return flash_attn_varlen_func(q, k, v, **{**GOOD, **arguments})


@pytest.mark.parametrize(("name", "value", "error", "message"), PACKED)
def test_of_packed_sequences(
    name: str, value: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        _call_packed(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_mask", _mask(130, 270)),
        ("attn_mask", _mask(129, 1)),
        ("attn_bias", torch.zeros(270)),
        ("block_mask", _mask(1, 1, 1, 2)),
    ],
    ids=str,
)
def test_a_mask_without_room_for_the_longest_sequence(name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*: expected room for the (130|271) rows"):
        _call_packed(**{name: value})


def test_the_good_arguments_are_taken() -> None:
    assert _call_packed().isfinite().all()
    assert _call_packed(attn_mask=_mask(300, 300), block_mask=_mask(9, 9)).isfinite().all()
