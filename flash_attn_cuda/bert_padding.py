# SPDX-License-Identifier: BSD-3-Clause
"""Padded batches to packed sequences and back, under flash-attn's names.

flash_attn_cuda itself takes padded batches as they are (key_padding_mask, seqlens_k), without these
copies and without waiting for the GPU, as :func:`unpad_input` must.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x, (rows, ...), by their numbers (n,): (n, ...). Differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse: (first_axis_dim, ...) with values (n, ...) in the rows of these numbers (n,),
    and zeros elsewhere. Differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch, on whichever side it is padded.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer; not 0 where there is a token.
        unused_mask: alike, of tokens that are kept but do not count; default: none.

    Returns:
        The tokens (total, ...); their indices in the flattened batch (total,) int64; cu_seqlens
        (batch + 1,) int32; the longest sequence's length, for which the host waits for the GPU; how
        many tokens of each sequence count, (batch,) int32.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(dim=1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = longest_of(lengths)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _first_rows(lengths), longest, used.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: (total, ...) and the indices of unpad_input to (batch, seqlen, ...), with zeros
    for padding."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *padded.shape[1:])


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs the tokens of a batch whose entries are several sequences each, one after another.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integer: the lengths of the sequences of each
            entry, then zeros.

    Returns:
        The first four of :func:`unpad_input`; cu_seqlens is of all sequences.
    """
    seqlen = hidden_states.shape[1]
    tokens_of_entry = attention_mask_in_length.sum(dim=1)
    is_token = torch.arange(seqlen, device=hidden_states.device) < tokens_of_entry[:, None]
    indices = is_token.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten().to(torch.int32)
    longest = longest_of(lengths)
    lengths = lengths[lengths != 0]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _first_rows(lengths), longest


def longest_of(lengths: Tensor) -> int:
    """0 where there are none; waits for the GPU. While traced it is a symbol, which int() refuses
    to be."""
    longest: Any = lengths.max().item() if lengths.numel() > 0 else 0
    return longest  # type: ignore[no-any-return]


def _first_rows(lengths: Tensor) -> Tensor:
    """(batch,) to (batch + 1,): 0 and the running sums."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
