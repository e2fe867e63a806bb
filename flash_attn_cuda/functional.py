# SPDX-License-Identifier: BSD-3-Clause
"""The public functions: flash-attn 2's arguments, order and returns, then our own arguments."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flash_attn_cuda import _ops

# A Tensor, or a tuple of them where the arguments ask for more than the output.
AttentionResult: TypeAlias = Tensor | Any

_UNBOUNDED = 1 << 40  # more keys than any sequence has
_NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _NO_WINDOW,
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
    """Exact attention, softmax(softmax_scale * q @ k^T) @ v, in memory linear in the lengths.

    Implements FlashAttention-2 (Dao, 2023, Algorithms 1 and 2). Query i sees key j if
    ``i + off - left <= j <= i + off + right``, where ``off = seqlen_k - seqlen_q`` and
    ``(left, right) = window_size``. A query that sees no key has output 0, LSE -inf, gradient 0.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim up to 512. bfloat16 or float16, on the CPU
            float32 or float64 too; on CUDA torch.autocast casts float32. Any strides.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads (grouped-query attention).
        v: like k.
        dropout_p: only 0.0 for now.
        softmax_scale: default head_dim ** -0.5.
        causal: sets the window's right side to 0.
        window_size: (left, right), in keys; -1 is unbounded.
        softcap: only 0.0 for now.
        alibi_slopes: only None for now.
        deterministic: gradients are the same bits at every run, somewhat slower; also where
            torch.use_deterministic_algorithms() is on, in either pass. Otherwise the backward pass
            on CUDA adds up dq, in float32, in whatever order its blocks finish. All else is always
            deterministic, on one type of GPU.
        return_attn_probs: return (out, softmax_lse, S_dmask) as flash-attn does, whatever
            return_lse says; S_dmask is empty without dropout.
        return_lse: return (out, softmax_lse); softmax_lse is (batch, heads, seqlen_q), float32
            (float64 for float64 inputs), natural log, and differentiable.
        attn_bias, attn_mask, key_padding_mask, seqlens_q, seqlens_k, document_ids, prefix_lens,
            sinks, block_mask, return_max_logit, generator: only their defaults for now.

    Returns:
        out, (batch, seqlen_q, heads, head_dim), contiguous, in the inputs' dtype; or a tuple as
        asked for above.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range; the message names it.
        NotImplementedError: an argument whose kernels do not exist yet, or a GPU without a kernel.
    """
    all_default = (
        dropout_p == softcap == 0.0
        and alibi_slopes
        is attn_bias
        is attn_mask
        is key_padding_mask
        is seqlens_q
        is seqlens_k
        is document_ids
        is prefix_lens
        is sinks
        is block_mask
        is None
        and generator is None
        and not return_max_logit
    )
    if not all_default:  # the dictionary takes longer than the question
        not_yet = {
            "dropout_p": dropout_p != 0.0,
            "softcap": softcap != 0.0,
            "alibi_slopes": alibi_slopes is not None,
            "attn_bias": attn_bias is not None,
            "attn_mask": attn_mask is not None,
            "key_padding_mask": key_padding_mask is not None,
            "seqlens_q": seqlens_q is not None,
            "seqlens_k": seqlens_k is not None,
            "document_ids": document_ids is not None,
            "prefix_lens": prefix_lens is not None,
            "sinks": sinks is not None,
            "block_mask": block_mask is not None,
            "return_max_logit": return_max_logit,
            "generator": generator is not None,
        }
        names = ", ".join(name for name, given in not_yet.items() if given)
        raise NotImplementedError(f"{names}: not implemented yet; leave the default")

    _check_arguments(q, k, v, softmax_scale)
    q, k, v = _autocast(q, k, v)
    window_left, window_right = _window(causal, window_size)
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    return_lse = return_lse or return_attn_probs
    output = _ops.attention(
        q, k, v, softmax_scale, window_left, window_right, deterministic, return_lse
    )
    return (*output, q.new_empty(0)) if return_attn_probs else output


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _NO_WINDOW,
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
    _check_packed("qkv", qkv, 3)
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
    window_size: tuple[int, int] = _NO_WINDOW,
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
    _check_packed("kv", kv, 2)
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


def _check_packed(name: str, packed: Tensor, parts: int) -> None:
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != 5 or packed.shape[2] != parts:
        raise ValueError(
            f"{name}: expected shape (batch, seqlen, {parts}, heads, head_dim), got "
            f"{tuple(packed.shape)}"
        )


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> None:
    """What the compiled code cannot check: that it is given tensors and a number."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if softmax_scale is not None and isinstance(softmax_scale, (str, bytes, Tensor)):
        raise TypeError(f"softmax_scale: expected a number, got {type(softmax_scale).__name__}")


def _window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right) as the operator takes them. While tracing, sides may be symbolic integers,
    which the operator checks when it runs."""
    if not torch.compiler.is_compiling():
        if window_size is _NO_WINDOW:
            return -1, 0 if causal else -1
        try:
            left, right = map(operator.index, window_size)
        except (TypeError, ValueError):
            left = right = -2
        if left < -1 or right < -1:
            raise ValueError(
                "window_size: expected (left, right), each a number of keys or -1 (unbounded), "
                f"got {window_size!r}"
            )
        return min(left, _UNBOUNDED), 0 if causal else min(right, _UNBOUNDED)
    left, right = window_size
    return left, 0 if causal else right


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own attention does."""
    device_type = "cuda" if q.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device_type) or q.device.type != device_type:
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    q, k, v = (tensor.to(dtype) if tensor.dtype in castable else tensor for tensor in (q, k, v))
    return q, k, v
