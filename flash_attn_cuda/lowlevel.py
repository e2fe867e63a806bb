# SPDX-License-Identifier: BSD-3-Clause
"""One forward and one backward pass without autograd, and how parts of attention are put together.

Ring and context parallelism compute attention over one part of the keys at a time. In forward each
part gives (out, lse), and :func:`merge` makes them one. In backward each part takes the merged out
and lse, and gives its own dk and dv and its share of dq; the shares add up.

FORWARD_OPERATORS are the operators that a forward pass may run, eager and traced ones: a policy of
selective activation checkpointing (torch.utils.checkpoint.create_selective_checkpoint_contexts)
that keeps attention's results looks for them, or is list(FORWARD_OPERATORS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda import _ops
from flash_attn_cuda._arguments import (
    NO_WINDOW,
    check_arguments,
    check_optional,
    new_rng_state,
    terms_of,
    window_of,
)

__all__ = [
    "FORWARD_OPERATORS",
    "Gradients",
    "backward",
    "dropout_mask",
    "forward",
    "merge",
    "new_rng_state",
]

FORWARD_OPERATORS = tuple(
    getattr(torch.ops.flash_attn_cuda, name).default
    for name in ("fwd", "fwd_eager", "fwd_general", "fwd_general_eager")
)


@dataclass(frozen=True)
class Gradients:
    """dq, dk, dv, each like what it is the gradient of; and, if asked for, dbias like attn_bias,
    and dslopes and dsinks of the shapes of alibi_slopes and sinks in the dtype of softmax_lse."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dslopes: Tensor | None = None
    dsinks: Tensor | None = None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    return_max_logit: bool = False,
    **options: Tensor | None,
) -> tuple[Tensor, ...]:
    """out and softmax_lse; autograd does not see it.

    Args:
        q, k, v, softmax_scale, causal, window_size: as of :func:`flash_attn_cuda.flash_attn_func`;
            or packed, three-dimensional, with cu_seqlens_q and cu_seqlens_k as of
            :func:`flash_attn_cuda.flash_attn_varlen_func`.
        softcap, alibi_slopes, sinks, dropout_p: as of those functions. Of parts of the keys that
            are to be merged, one alone has the sinks.
        rng_state: (2,) int64 on the device of q, seed and offset of dropout, as
            :func:`new_rng_state` draws it; where dropout_p is above 0 and it is None, one is drawn
            from torch's own generator.
        return_max_logit: as of those functions.
        options: cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k (of padded batches seqlens_q and
            seqlens_k), attn_bias, attn_mask, key_padding_mask, block_mask, document_ids,
            prefix_lens; as of those functions.

    Returns:
        (out, softmax_lse) as those functions return them, then max_logit where asked for, then,
        where dropout_p is above 0, the rng_state that :func:`backward` needs.

    Raises:
        What those functions raise.
    """
    check_arguments(q, k, v, softmax_scale)
    tensors = _tensors(options)
    packed = tensors[0] is not None
    left, right = window_of(causal, window_size)
    q, k, v = _with_batch((q, k, v), packed)
    terms = terms_of(q, dropout_p, softcap, alibi_slopes, sinks, rng_state=rng_state)
    with torch.no_grad():
        out, softmax_lse, max_logit = _ops.general_attention(
            q, k, v, tensors, softmax_scale, left, right, False, terms, return_max_logit
        )
    results: tuple[Tensor, ...] = (out, softmax_lse)
    if packed:
        results = (out.squeeze(0), softmax_lse.squeeze(0))
    if return_max_logit:
        results = (*results, max_logit)
    return results if terms.rng_state is None else (*results, terms.rng_state)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    deterministic: bool = False,
    needs_dbias: bool = False,
    needs_dslopes: bool = False,
    needs_dsinks: bool = False,
    **options: Tensor | None,
) -> Gradients:
    """The gradients, given out and softmax_lse of the forward pass, or of attention over more keys
    than these.

    Args:
        dout: gradient of out, like out.
        q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, sinks, dropout_p,
            options: as of :func:`forward`.
        rng_state: what forward returned, needed where dropout_p is above 0.
        out, softmax_lse: what forward returned, or what :func:`merge` made of several.
        dlse: gradient of softmax_lse, like it; default: none.
        deterministic: as of :func:`flash_attn_cuda.flash_attn_func`.
        needs_dbias, needs_dslopes, needs_dsinks: whether to compute the gradients of attn_bias,
            alibi_slopes and sinks.

    Returns:
        :class:`Gradients`.

    Raises:
        What :func:`forward` raises.
    """
    check_arguments(q, k, v, softmax_scale)
    check_optional(dlse=dlse)
    tensors = _tensors(options)
    packed = tensors[0] is not None
    left, right = window_of(causal, window_size)
    statistics = [softmax_lse] if dlse is None else [softmax_lse, dlse]
    statistics = _with_batch(statistics, packed)
    dout, q, k, v, out = _with_batch((dout, q, k, v, out), packed)
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    if dropout_p != 0.0 and rng_state is None:
        raise ValueError(
            f"rng_state: expected what forward returned, where dropout_p is {dropout_p}, got None"
        )
    terms = terms_of(q, dropout_p, softcap, alibi_slopes, sinks, rng_state=rng_state)
    needed = (needs_dbias, needs_dslopes, needs_dsinks)
    dq, dk, dv, *more = _ops.general_backward(
        dout,
        None if dlse is None else statistics[1],
        *(q, k, v, out, statistics[0]),
        *tensors,
        *terms.inputs,
        *(softmax_scale, left, right, deterministic, _ops.allows_tf32(q)),
        *needed,
    )
    if packed:
        dq, dk, dv = dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)
    of_terms = (x if is_needed else None for x, is_needed in zip(more, needed, strict=True))
    return Gradients(dq, dk, dv, *of_terms)


def dropout_mask(
    rng_state: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """Which probabilities dropout keeps: Philox4x32-7 (Salmon et al., 2011), as
    csrc/common/philox.h tells.

    Args:
        rng_state: (2,) int64, seed and offset.
        dropout_p: from 0 to 1.
        batch, heads, seqlen_q, seqlen_k: of the attention; packed sequences count as batch
            entries, and their queries and keys from the first of each.

    Returns:
        (batch, heads, seqlen_q, seqlen_k) bool on the device of rng_state, True where kept.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or range; the message names it.
    """
    return _ops.dropout_mask(rng_state, dropout_p, batch, heads, seqlen_q, seqlen_k)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each of them: Milakov and Gimelshein
    (2018), section 3.1, as FlashAttention (Dao et al., 2022, section 3.1) uses it.

    Args:
        out, more_out: (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim), of a
            floating dtype.
        lse, more_lse: (batch, heads, seqlen_q) or (heads, total_q); -inf where no key is seen.

    Returns:
        (out, lse): out in the dtype of its arguments, which are best float32 where many parts are
        merged one after another.
    """
    merged = torch.logaddexp(lse, more_lse)
    finite = merged.masked_fill(merged == -torch.inf, 0.0)

    def share(part: Tensor, part_lse: Tensor) -> Tensor:
        weight = torch.exp(part_lse - finite).transpose(-1, -2).unsqueeze(-1)
        return weight * part.to(weight.dtype)

    return (share(out, lse) + share(more_out, more_lse)).to(out.dtype), merged


_PACKED = ("cu_seqlens_q", "cu_seqlens_k")
_OPTIONS = (
    *_PACKED,
    "seqused_q",
    "seqused_k",
    "attn_bias",
    "attn_mask",
    "key_padding_mask",
    "block_mask",
    "document_ids",
    "prefix_lens",
)
_OTHER_NAMES = {"seqlens_q": "seqused_q", "seqlens_k": "seqused_k"}


def _tensors(options: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """In the order of the operator."""
    unknown = set(options) - set(_OPTIONS) - set(_OTHER_NAMES)
    if unknown:
        raise TypeError(f"expected options among {', '.join(_OPTIONS)}, got {sorted(unknown)}")
    check_optional(**options)
    named = {_OTHER_NAMES.get(name, name): tensor for name, tensor in options.items()}
    return tuple(named.get(name) for name in _OPTIONS)


def _with_batch(tensors: list[Tensor] | tuple[Tensor, ...], packed: bool) -> list[Tensor]:
    return [tensor.unsqueeze(0) if packed else tensor for tensor in tensors]
