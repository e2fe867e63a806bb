# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: flash-attn 2's arguments, order and returns, then our own arguments."""

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
    results_of,
    terms_of,
    window_of,
)
from flash_attn_cuda._probabilities import signed_probabilities


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """Exact attention, softmax(softmax_scale * q @ k^T + attn_bias) @ v, without ever holding the
    matrix of scores.

    Implements FlashAttention-2 (Dao, 2023, Algorithms 1 and 2) and, with block_mask, block-sparse
    FlashAttention (Dao et al., 2022, Algorithm 5). All arguments go together. Query i sees key j if
    ``i + off - left <= j <= i + off + right``, where ``off = seqlen_k - seqlen_q`` and
    ``(left, right) = window_size``, or if ``j < prefix_lens[b]``; both must be of one document, and
    every mask must say True. What a query does not see has no influence on it. A query that sees no
    key has output 0, LSE -inf, gradient 0.

    All transforms of torch.func apply. vmap of any arguments is one call, in which the mapped
    dimension joins the batch; but one call for each element with dropout, with return_max_logit, or
    where sinks are mapped or have gradients of each element. Derivatives beyond the gradient
    (double backward, forward-mode AD, of any order) are computed in plain torch from q, k and v, in
    float32 (float64 for float64), 64 queries at a time: in memory linear in the sequence length.
    With dropout they raise NotImplementedError.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim up to 512. bfloat16, float16, float32 (on
            CUDA with a head_dim up to 256) or, on the CPU, float64. Any strides. On CUDA, products
            of float32 are as exact as float32, or TF32 where torch's matrix products may be
            (torch.backends.cuda.matmul.fp32_precision, torch.set_float32_matmul_precision).
            torch.autocast casts.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads (grouped-query attention).
        v: (batch, seqlen_k, heads_kv, head_dim_v); head_dim_v up to 512, often head_dim.
        dropout_p: probability that a probability is dropped, after the softmax (Srivastava et al.,
            2014); others are divided by that of being kept, a multiple of 2^-16. softmax_lse is
            without dropout. What is dropped is a function of a state drawn from `generator`, of
            batch, head, query and key: the same on every device and in both passes.
        softmax_scale: default head_dim ** -0.5.
        causal: sets the window's right side to 0.
        window_size: (left, right), in keys; -1 is unbounded.
        softcap: products become ``softcap * tanh(softmax_scale * q @ k^T / softcap)`` (Gemma 2),
            before anything is added to them; 0.0 is without.
        alibi_slopes: (heads,) or (batch, heads); ``- slope * |i + off - j|`` is added to scores
            (Press et al., 2022). Any strides; float32, bfloat16 or float16 (or float64 beside
            float64), with a gradient.
        deterministic: gradients are the same bits at every run, somewhat slower; also where
            torch.use_deterministic_algorithms() is on, in either pass. Otherwise the backward pass
            on CUDA adds up dq, in float32, in whatever order its blocks finish. All else is always
            deterministic, on one type of GPU.
        return_attn_probs: return (out, softmax_lse, S_dmask) as flash-attn does, whatever
            return_lse says. Without dropout S_dmask is empty. With it, for debugging, it is
            (batch, heads, seqlen_q, seqlen_k), the probabilities before dropout, negative where
            dropped, without a gradient; it takes the memory that attention itself avoids.
        return_lse: return (out, softmax_lse); softmax_lse is (batch, heads, seqlen_q), float32
            (float64 for float64 inputs), natural log, and differentiable.
        attn_bias: added to the scores. Broadcasts to (batch, heads, seqlen_q, seqlen_k), with any
            strides; bfloat16, float16 or float32 (or float64 beside float64). Its gradient has its
            shape and is summed over what was broadcast, always in the same order. -inf hides.
        attn_mask: bool, True where a key is seen. Broadcasts like attn_bias. Tiles of keys of which
            nothing is seen cost nothing.
        key_padding_mask: (batch, seqlen_k) bool, True where a key exists: padding on either side.
            Windows count keys in the tensor, padding included.
        seqlens_q, seqlens_k: (batch,) int32: how many rows of each sequence exist, from the first
            on; off is then of these lengths. Rows of out beyond are 0, as are their gradients, and
            what lies there is not read.
        document_ids: (batch, seqlen) int32, where seqlen_q == seqlen_k: a query sees keys of its
            own document only.
        prefix_lens: (batch,) int32: so many first keys are seen by every query, whatever the
            window (prefix-LM).
        block_mask: bool, True where blocks of 128 queries and 128 keys are seen. Broadcasts to
            (batch, heads, ceil(seqlen_q / 128), ceil(seqlen_k / 128)). Takes time in proportion to
            the blocks that are.
        sinks: (heads,); exp(sink) joins the denominator of each row, as a key without a value
            would (Xiao et al., 2023; GPT-OSS). A query that sees no key then has LSE = sink. Dtypes
            as of alibi_slopes, with a gradient; -inf is without.
        return_max_logit: return, last, the largest score of all pairs seen of each head: (heads,)
            in the dtype of softmax_lse, -inf where there is none, without a gradient.
        generator: torch.Generator of the device of q that dropout's state is drawn from; default:
            torch's own, as torch.manual_seed() sets it. torch.compile, which cannot trace one,
            breaks its graph there.

    Returns:
        out, (batch, seqlen_q, heads, head_dim_v), contiguous, in the inputs' dtype; or a tuple as
        asked for above.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
        NotImplementedError: arguments or a GPU that no kernel is for.
    """
    check_arguments(q, k, v, softmax_scale)
    q, k, v = autocast(q, k, v)
    left, right = window_of(causal, window_size)
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    if (
        attn_bias
        is attn_mask
        is key_padding_mask
        is seqlens_q
        is seqlens_k
        is document_ids
        is prefix_lens
        is block_mask
        is alibi_slopes
        is sinks
        is None
        and dropout_p == softcap == 0.0
        and not return_max_logit
    ):
        return_lse = return_lse or return_attn_probs
        output = _ops.attention(q, k, v, softmax_scale, left, right, deterministic, return_lse)
        return (*output, q.new_empty(0)) if return_attn_probs else output
    rules = {
        "attn_bias": attn_bias,
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "block_mask": block_mask,
        "document_ids": document_ids,
        "prefix_lens": prefix_lens,
    }
    check_optional(seqlens_q=seqlens_q, seqlens_k=seqlens_k, **rules)
    terms = terms_of(q, dropout_p, softcap, alibi_slopes, sinks, generator)
    tensors = (None, None, seqlens_q, seqlens_k, *rules.values())
    out, softmax_lse, max_logit = _ops.general_attention(
        *(q, k, v, tensors, softmax_scale, left, right, deterministic, terms, return_max_logit)
    )
    probabilities = None
    if return_attn_probs:
        probabilities = signed_probabilities(
            q,
            k,
            softmax_lse,
            terms,
            softmax_scale=softmax_scale,
            window_size=(left, right),
            seqlens_q=seqlens_q,
            seqlens_k=seqlens_k,
            **rules,
        )
    return results_of(out, softmax_lse, max_logit, probabilities, return_lse, return_max_logit)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
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
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """:func:`flash_attn_func` on one packed tensor.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim): q, k, v along dimension 2. They are read in place.

    All other arguments, the results and the errors are those of :func:`flash_attn_func`.
    """
    check_packed("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)", 3)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse=return_lse,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        document_ids=document_ids,
        prefix_lens=prefix_lens,
        sinks=sinks,
        block_mask=block_mask,
        return_max_logit=return_max_logit,
        generator=generator,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    attn_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_max_logit: bool = False,
    generator: torch.Generator | None = None,
) -> AttentionResult:
    """:func:`flash_attn_func` with keys and values in one packed tensor.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        kv: (batch, seqlen_k, 2, heads_kv, head_dim): k, v along dimension 2. They are read in
            place.

    All other arguments, the results and the errors are those of :func:`flash_attn_func`.
    """
    check_packed("kv", kv, "(batch, seqlen, 2, heads, head_dim)", 2)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        return_lse=return_lse,
        attn_bias=attn_bias,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        document_ids=document_ids,
        prefix_lens=prefix_lens,
        sinks=sinks,
        block_mask=block_mask,
        return_max_logit=return_max_logit,
        generator=generator,
    )
