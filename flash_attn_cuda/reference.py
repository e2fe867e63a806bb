# SPDX-License-Identifier: BSD-3-Clause
"""Attention in plain PyTorch: what the kernels compute, written to be read rather than to be fast.

All functions store the whole (seqlen_q, seqlen_k) matrix of scores, which FlashAttention
(Dao et al. 2022; FlashAttention-2, Dao 2023) avoids:

    S = cap(softmax_scale * Q K^T) - slope * distance + bias,  cap(x) = softcap tanh(x / softcap),
    LSE = log(sum(exp(S)) + exp(sink)),   P = exp(S - LSE),   O = dropout(P) V.

`attention_ref` is the yardstick of the tests, and `attention_varlen_ref` the same for packed
sequences; `visible_pairs` is the one rule behind every mask, and `attention_scores` gives S.
`standard_attention` is the usual implementation in the precision of its inputs, which the demo and
the benchmarks compare with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "attention_ref",
    "attention_scores",
    "attention_varlen_ref",
    "keep_probability",
    "standard_attention",
    "visible_pairs",
    "window_mask",
]

BLOCK = 128  # queries, and keys, that an element of a block mask stands for


def window_mask(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees: a (seqlen_q, seqlen_k) bool tensor, True where visible.

    Aligned at the bottom right, so that the last query sees the last key: with
    offset = seqlen_k - seqlen_q, query i sees key j iff
    i + offset - left <= j <= i + offset + right. A side of -1 is unbounded; `causal` sets right
    to 0.
    """
    query = torch.arange(seqlen_q, device=device)[:, None]
    key = torch.arange(seqlen_k, device=device)[None, :]
    return _in_window(key - (query + seqlen_k - seqlen_q), causal, window_size)


def visible_pairs(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    block_mask: Tensor | None = None,
    rows: range | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees: bool, (batch or 1, heads or 1, queries, seqlen_k).

    Query i sees key j iff both exist, the window shows j or j < prefix_lens, both are of one
    document, and every mask is True there. Masks and documents count from row 0 of the tensors.

    seqlens_q, seqlens_k: (batch,), how many rows exist; the window (see `window_mask`) is aligned
    at these ends. prefix_lens: (batch,). document_ids: (batch, seqlen), where seqlen_q = seqlen_k.
    attn_mask: broadcastable to (batch, heads, seqlen_q, seqlen_k); key_padding_mask:
    (batch, seqlen_k); block_mask: broadcastable to
    (batch, heads, ceil(seqlen_q / 128), ceil(seqlen_k / 128)).

    rows: consecutive queries, default all. The result, and attn_mask, are of these rows alone.
    """
    lengths = (seqlens_q, seqlens_k)
    query, key, length_q, length_k = _places(rows, seqlen_q, seqlen_k, *lengths, device)
    distance = _distance(rows, seqlen_q, seqlen_k, *lengths, device)
    visible = _in_window(distance, causal, window_size)
    if prefix_lens is not None:
        visible = visible | (key < prefix_lens[:, None, None, None])
    visible = visible & (query < length_q) & (key < length_k)
    if document_ids is not None:
        of_query = document_ids[:, None, :, None]
        if rows is not None:
            of_query = of_query[:, :, rows.start : rows.stop]
        visible = visible & (of_query == document_ids[:, None, None, :])
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        visible = visible & attn_mask
    if block_mask is not None:
        visible = visible & _expand_blocks(block_mask, query.flatten(), key.flatten())
    return visible


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
    rows: range | None = None,
    seqlen_q: int | None = None,
    upcast: torch.dtype = torch.float64,
    **of_scores: Any,
) -> tuple[Tensor, Tensor]:
    """Exact attention, computed in `upcast` and differentiable through both results.

    q is (batch, seqlen_q, heads, head_dim), k is (batch, seqlen_k, heads_kv, head_dim) and v is
    (batch, seqlen_k, heads_kv, head_dim_v), where heads_kv divides heads and key head i serves the
    query heads of the i-th group. sinks, (heads,), are the logarithms of what joins a row's
    denominator. Where `kept`, bool and broadcastable to (batch, heads, seqlen_q, seqlen_k), is
    False, a probability is dropped; others are divided by `keep_probability(dropout_p)`.
    `of_scores` are the arguments of `attention_scores`, those of `visible_pairs` among them. A pair
    that these hide has no influence, even where its bias is NaN, nor has a row of q, k or v that
    takes part in no pair.

    Given rows and seqlen_q, q, attn_bias, attn_mask, kept and the results are of these consecutive
    rows alone, of seqlen_q queries in all.

    Returns out, (batch, seqlen_q, heads, head_dim_v), and lse, (batch, heads, seqlen_q), the
    natural logarithm of each row's softmax denominator, both in `upcast`. A row that sees no key,
    or only scores of -inf, has out 0, lse -inf (or its sink) and gradients of 0 but for the sink's.
    """
    seqlen_q = q.shape[1] if seqlen_q is None else seqlen_q
    scores = attention_scores(q, k, rows=rows, seqlen_q=seqlen_q, upcast=upcast, **of_scores)
    seen = (scores != -math.inf).any(dim=2)[..., None]
    # NaN times 0 is NaN: rows without a pair are 0.
    v = _repeat_heads(v.to(upcast).transpose(1, 2), q.shape[2]).masked_fill(~seen, 0.0)
    terms = scores
    if sinks is not None:
        query, _, length_q, _ = _places(
            rows, seqlen_q, k.shape[1], of_scores.get("seqlens_q"), None, q.device
        )
        sink = sinks.to(upcast)[:, None, None].masked_fill(query >= length_q, -math.inf)
        terms = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
    # The logarithm of an empty sum is -inf, and its derivative is NaN. Rows without a key are
    # therefore taken out before the logarithm and put back after it.
    is_empty = (terms == -math.inf).all(dim=-1)
    log_sum = torch.logsumexp(terms.masked_fill(is_empty[..., None], 0.0), dim=-1)
    probabilities = torch.exp(scores - log_sum.masked_fill(is_empty, 0.0)[..., None])
    if kept is not None:
        probability = keep_probability(dropout_p)
        probabilities = probabilities * kept / (probability or 1.0)
    out = (probabilities @ v).transpose(1, 2)
    lse = log_sum.masked_fill(is_empty, -math.inf)
    return out, lse


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    rows: range | None = None,
    seqlen_q: int | None = None,
    upcast: torch.dtype = torch.float64,
    **visibility: Any,
) -> Tensor:
    """What goes into the softmax, (batch, heads, seqlen_q, seqlen_k) in `upcast`: -inf where a pair
    is hidden.

    q and k are as for `attention_ref`. softmax_scale is 1 / sqrt(head_dim) by default; softcap is
    none where 0. Query i is aligned with key i + seqlen_k - seqlen_q (of seqlens_q and seqlens_k
    where given), and ALiBi adds - slope * its distance from the key: alibi_slopes is (heads,) or
    (batch, heads). attn_bias is added and broadcastable to the result. rows and seqlen_q are as for
    `attention_ref`, and `visibility` are the arguments of `visible_pairs`.
    """
    seqlen_q = q.shape[1] if seqlen_q is None else seqlen_q
    visible = visible_pairs(seqlen_q, k.shape[1], rows=rows, device=q.device, **visibility)
    seeing, seen = visible.any(dim=3)[..., None], visible.any(dim=2)[..., None]
    heads = q.shape[2]
    # (batch, heads, seqlen, head_dim) from here on. NaN times 0 is NaN: rows without a pair are 0.
    q, k = (x.to(upcast).transpose(1, 2) for x in (q, k))
    q = q.masked_fill(~seeing, 0.0)
    k = _repeat_heads(k, heads).masked_fill(~seen, 0.0)
    scores = _scale_or_default(softmax_scale, q.shape[3]) * (q @ k.mT)
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        lengths = (visibility.get("seqlens_q"), visibility.get("seqlens_k"))
        distance = _distance(rows, seqlen_q, k.shape[2], *lengths, q.device).abs()
        scores = scores - alibi_slopes.to(upcast)[..., None, None] * distance
    if attn_bias is not None:
        scores = scores + attn_bias.to(upcast)
    return scores.masked_fill(~visible, -math.inf)


def keep_probability(dropout_p: float) -> float:
    """Of dropout: 1 - dropout_p, rounded to a multiple of 2^-16."""
    return math.floor((1.0 - dropout_p) * 65536 + 0.5) / 65536


def attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    block_mask: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    kept: Tensor | None = None,
    upcast: torch.dtype = torch.float64,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """`attention_ref` of each of several packed sequences.

    q is (total_q, heads, head_dim), k is (total_k, heads_kv, head_dim) and v is
    (total_k, heads_kv, head_dim_v). Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], of which
    the first seqused[i] count. attn_bias, attn_mask, block_mask and kept are as for `attention_ref`
    with the longest sequences' lengths, prefix_lens is (batch,), alibi_slopes (heads,) or
    (batch, heads), and `arguments` are those of `attention_ref` that are the same for all
    sequences.

    Returns out, (total_q, heads, head_dim_v), and lse, (heads, total_q). Rows of no sequence have
    out 0 and lse -inf.
    """
    slopes = alibi_slopes
    rows_q, rows_k = sequence_rows(cu_seqlens_q, seqused_q), sequence_rows(cu_seqlens_k, seqused_k)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=upcast, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=upcast, device=q.device)
    for index, (of_q, of_k) in enumerate(zip(rows_q, rows_k, strict=True)):
        length_q, length_k = of_q.stop - of_q.start, of_k.stop - of_k.start
        blocks_q, blocks_k = math.ceil(length_q / BLOCK), math.ceil(length_k / BLOCK)
        one_out, one_lse = attention_ref(
            q[None, of_q],
            k[None, of_k],
            v[None, of_k],
            attn_bias=_of_sequence(attn_bias, index, length_q, length_k),
            attn_mask=_of_sequence(attn_mask, index, length_q, length_k),
            block_mask=_of_sequence(block_mask, index, blocks_q, blocks_k),
            prefix_lens=None if prefix_lens is None else prefix_lens[index : index + 1],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[index],
            kept=_of_sequence(kept, index, length_q, length_k),
            upcast=upcast,
            **arguments,
        )
        place = torch.arange(of_q.start, of_q.stop, device=q.device)
        out = out.index_copy(0, place, one_out[0])
        lse = lse.index_copy(1, place, one_lse[0])
    return out, lse


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention as usually written: matmul, softmax, matmul, each in the dtype of the inputs.

    Shapes and arguments as for `attention_ref`; returns out alone. Every row must see a key:
    softmax gives NaN for a row that sees none.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    heads = q.shape[2]
    q, k, v = (_repeat_heads(x.transpose(1, 2), heads) for x in (q, k, v))
    scores = q @ k.mT
    scores = scores * _scale_or_default(softmax_scale, q.shape[3])
    if causal or tuple(window_size) != (-1, -1):
        mask = window_mask(
            seqlen_q, seqlen_k, causal=causal, window_size=window_size, device=q.device
        )
        scores = scores.masked_fill(~mask, -math.inf)
    out = torch.softmax(scores, dim=-1) @ v
    return out.transpose(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _scale_or_default(softmax_scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale


def _places(
    rows: range | None,
    seqlen_q: int,
    seqlen_k: int,
    seqlens_q: Tensor | None,
    seqlens_k: Tensor | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, int | Tensor, int | Tensor]:
    """Queries, keys and how many exist, each broadcastable to (batch, 1, rows, seqlen_k)."""
    # A range of a length that is traced would be a constant of the graph.
    first, end = (0, seqlen_q) if rows is None else (rows.start, rows.stop)
    query = torch.arange(first, end, device=device)[None, None, :, None]
    key = torch.arange(seqlen_k, device=device)[None, None, None, :]
    length_q = seqlen_q if seqlens_q is None else seqlens_q[:, None, None, None]
    length_k = seqlen_k if seqlens_k is None else seqlens_k[:, None, None, None]
    return query, key, length_q, length_k


def _distance(
    rows: range | None,
    seqlen_q: int,
    seqlen_k: int,
    seqlens_q: Tensor | None,
    seqlens_k: Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """How far a key lies after the one that is aligned with the query: (batch or 1, 1, rows,
    seqlen_k)."""
    lengths = (seqlens_q, seqlens_k)
    query, key, length_q, length_k = _places(rows, seqlen_q, seqlen_k, *lengths, device)
    return key - (query + length_k - length_q)


def _in_window(distance: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """distance: how far a key lies after the one that is aligned with the query."""
    left, right = window_size
    if causal:
        right = 0
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def _expand_blocks(block_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    for dim, places in ((-2, query), (-1, key)):
        if block_mask.dim() >= -dim and block_mask.shape[dim] != 1:
            block_mask = block_mask.index_select(dim, places // BLOCK)
    return block_mask


def sequence_rows(cu_seqlens: Tensor, seqused: Tensor | None) -> list[slice]:
    """The rows of each packed sequence that count; waits for the GPU."""
    begins, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    if seqused is not None:
        lengths = zip(begins, ends, seqused.tolist(), strict=True)
        ends = [min(end, begin + used) for begin, end, used in lengths]
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]


def _of_sequence(x: Tensor | None, index: int, size_q: int, size_k: int) -> Tensor | None:
    """What `x`, broadcastable to (batch, heads, size_q or more, size_k or more), says of one."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.dim()) + x.shape)
    x = x if x.shape[0] == 1 else x[index : index + 1]
    x = x if x.shape[2] == 1 else x[:, :, :size_q]
    return x if x.shape[3] == 1 else x[..., :size_k]
