# SPDX-License-Identifier: BSD-3-Clause
"""The public functions for packed sequences: flash-attn 2's arguments, order and returns, then our
own arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_cuda import _ops
from flash_attn_cuda._arguments import (
    NO_WINDOW,
    AttentionResult,
    autocast,
    check_arguments,
    check_optional,
    check_packed,
    refuse_later,
    results_of,
    terms_of,
    window_of,
)
from flash_attn_cuda._probabilities import signed_probabilities_of_packed


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    return_lse: bool = False,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """:func:`flash_attn_cuda.flash_attn_func` on sequences packed one after another, without
    padding.

    Sequence b has the queries ``q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]``, and keys alike. Its
    windows are aligned at its own bottom right. A sequence may be empty. Nothing waits for the GPU
    but derivatives beyond the gradient, which are computed one sequence after another. vmap is one
    call for each element.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_kv, head_dim); heads_kv divides heads.
        v: (total_k, heads_kv, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, on the device of q: the first row of each
            sequence, and the end of the last. Rows before the first and after the last belong to
            none. What they hold is checked on the CPU, and on CUDA where the environment has
            FLASH_ATTN_CUDA_VALIDATE=1; else wrong values lead to wrong results, never out of the
            tensors.
        max_seqlen_q, max_seqlen_k: not needed, and not read; flash-attn's callers pass them.
        seqused_q, seqused_k: (batch,) int32: how many rows of each sequence count, from its first
            on; default: all.
        attn_bias, attn_mask: broadcast to (batch, heads, longest q, longest k), counted from the
            first row of each sequence; as large as the longest sequence or larger.
        block_mask: broadcasts to (batch, heads, blocks, blocks), alike.
        return_attn_probs: S_dmask is (batch, heads, longest q, longest k), counted alike, and the
            host then waits for the GPU.
        block_table: only None for now.

    All other arguments and the errors are those of :func:`flash_attn_cuda.flash_attn_func`.

    Returns:
        out, (total_q, heads, head_dim_v), 0 in rows of no sequence; or a tuple as asked for, in
        which softmax_lse is (heads, total_q), -inf in such rows.
    """
    if block_table is not None:
        refuse_later(block_table=True)
    check_arguments(q, k, v, softmax_scale)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: expected 3 dimensions (total, heads, head_dim), got {tensor.dim()} in "
                f"shape {tuple(tensor.shape)}"
            )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(length, (int, Tensor, torch.SymInt, type(None))):
            raise TypeError(f"{name}: expected an int, a Tensor or None, got {length!r}")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    rules = {
        "attn_bias": attn_bias,
        "attn_mask": attn_mask,
        "key_padding_mask": None,
        "block_mask": block_mask,
        "document_ids": None,
        "prefix_lens": prefix_lens,
    }
    check_optional(seqused_q=seqused_q, seqused_k=seqused_k, **rules)
    q, k, v = autocast(q, k, v)
    left, right = window_of(causal, window_size)
    terms = terms_of(q, dropout_p, softcap, alibi_slopes, sinks, generator)
    sequences = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    out, softmax_lse, max_logit = _ops.general_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        (*sequences, *rules.values()),
        softmax_scale,
        left,
        right,
        bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
        terms,
        return_max_logit,
    )
    out, softmax_lse = out.squeeze(0), softmax_lse.squeeze(0)
    probabilities = None
    if return_attn_probs:
        probabilities = signed_probabilities_of_packed(
            q,
            k,
            softmax_lse,
            terms,
            sequences,
            softmax_scale=softmax_scale,
            window_size=(left, right),
            **rules,
        )
    return results_of(out, softmax_lse, max_logit, probabilities, return_lse, return_max_logit)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    seqused: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` on one packed tensor.

    Args:
        qkv: (total, 3, heads, head_dim): q, k, v along dimension 1. They are read in place.
        cu_seqlens, max_seqlen, seqused: of queries and keys alike.

    All other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    check_packed("qkv", qkv, "(total, 3, heads, head_dim)", 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse=return_lse,
        seqused_q=seqused,
        seqused_k=seqused,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        prefix_lens=prefix_lens,
        sinks=sinks,
        block_mask=block_mask,
        return_max_logit=return_max_logit,
        generator=generator,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` with keys and values in one packed tensor.

    Args:
        q: (total_q, heads, head_dim).
        kv: (total_k, 2, heads_kv, head_dim): k, v along dimension 1. They are read in place.

    All other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    check_packed("kv", kv, "(total_k, 2, heads_kv, head_dim)", 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse=return_lse,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        prefix_lens=prefix_lens,
        sinks=sinks,
        block_mask=block_mask,
        return_max_logit=return_max_logit,
        generator=generator,
    )
