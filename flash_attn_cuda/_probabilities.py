# SPDX-License-Identifier: BSD-3-Clause
"""flash-attn's S_dmask: the probabilities themselves, with dropout's decisions as their signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda import _ops
from flash_attn_cuda.bert_padding import longest_of
from flash_attn_cuda.reference import attention_scores


@torch.no_grad()
def signed_probabilities(
    q: Tensor, k: Tensor, softmax_lse: Tensor, terms: _ops.Terms, **of_scores: Any
) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k) in q's dtype: negative where dropped, not scaled for
    dropout, 0 where hidden. Empty without dropout.

    `of_scores` are the arguments of :func:`flash_attn_cuda.reference.attention_scores` beside the
    terms.
    """
    if terms.rng_state is None:
        return q.new_empty(0)
    scores = attention_scores(
        q,
        k,
        softcap=terms.softcap,
        alibi_slopes=terms.alibi_slopes,
        upcast=softmax_lse.dtype,
        **of_scores,
    )
    probabilities = torch.exp(scores - softmax_lse[..., None])
    probabilities = probabilities.masked_fill(scores == -torch.inf, 0.0)
    kept = _ops.dropout_mask(terms.rng_state, terms.dropout_p, *scores.shape)
    return torch.where(kept, probabilities, -probabilities).to(q.dtype)


def signed_probabilities_of_packed(
    q: Tensor,
    k: Tensor,
    softmax_lse: Tensor,
    terms: _ops.Terms,
    sequences: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    **of_scores: Tensor | Any,
) -> Tensor:
    """The same of packed sequences, (batch, heads, longest q, longest k); waits for the GPU.

    q, k: (total, heads, head_dim); softmax_lse: (heads, total_q). sequences: cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k.
    """
    if terms.rng_state is None:
        return q.new_empty(0)
    cu_seqlens_q, cu_seqlens_k, *used = sequences
    slots = [x.diff() for x in (cu_seqlens_q, cu_seqlens_k)]
    longest = [longest_of(x) for x in slots]
    lengths = [slot if u is None else u for slot, u in zip(slots, used, strict=True)]
    blocks = [-(-size // 128) for size in longest]
    for name, sizes in (("attn_bias", longest), ("attn_mask", longest), ("block_mask", blocks)):
        of_scores[name] = _cut(of_scores.get(name), *sizes)
    return signed_probabilities(
        _padded(q, cu_seqlens_q, longest[0]),
        _padded(k, cu_seqlens_k, longest[1]),
        _padded(softmax_lse.T, cu_seqlens_q, longest[0]).transpose(1, 2),
        terms,
        seqlens_q=lengths[0],
        seqlens_k=lengths[1],
        **of_scores,
    )


def _padded(packed: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """(total, ...) -> (batch, longest, ...); what lies past a sequence's end is of others."""
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=packed.device)
    return packed[rows.clamp(max=max(packed.shape[0] - 1, 0))]


def _cut(x: Tensor | None, size_q: int, size_k: int) -> Tensor | None:
    for dim, size in ((-2, size_q), (-1, size_k)):
        if x is not None and x.dim() >= -dim and x.shape[dim] != 1:
            x = x.narrow(dim, 0, size)
    return x
