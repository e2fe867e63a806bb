# SPDX-License-Identifier: BSD-3-Clause
"""One forward and one backward pass without autograd, and how parts of attention are put together.

Ring and context parallelism compute attention over one part of the keys at a time. In forward each
part gives (out, lse), and :func:`merge` makes them one. In backward each part takes the merged out
and lse, and gives its own dk and dv and its share of dq; the shares add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_cuda import _ops
from flash_attn_cuda._arguments import NO_WINDOW, check_arguments, check_optional, window_of

__all__ = ["Gradients", "backward", "forward", "merge"]


@dataclass(frozen=True)
class Gradients:
    """dq, dk, dv, each like what it is the gradient of, and dbias like attn_bias, if asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    **options: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse; autograd does not see it.

    Args:
        q, k, v, softmax_scale, causal, window_size: as of :func:`flash_attn_cuda.flash_attn_func`;
            or packed, three-dimensional, with cu_seqlens_q and cu_seqlens_k as of
            :func:`flash_attn_cuda.flash_attn_varlen_func`.
        options: cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k (of padded batches seqlens_q and
            seqlens_k), attn_bias, attn_mask, key_padding_mask, block_mask, document_ids,
            prefix_lens; as of those functions.

    Returns:
        (out, softmax_lse) as those functions return them.

    Raises:
        What those functions raise.
    """
    check_arguments(q, k, v, softmax_scale)
    tensors = _tensors(options)
    packed = tensors[0] is not None
    left, right = window_of(causal, window_size)
    q, k, v = _with_batch((q, k, v), packed)
    with torch.no_grad():
        out, softmax_lse = _ops.general_attention(
            q, k, v, tensors, softmax_scale, left, right, False
        )
    return (out.squeeze(0), softmax_lse.squeeze(0)) if packed else (out, softmax_lse)


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
    deterministic: bool = False,
    needs_dbias: bool = False,
    **options: Tensor | None,
) -> Gradients:
    """The gradients, given out and softmax_lse of the forward pass, or of attention over more keys
    than these.

    Args:
        dout: gradient of out, like out.
        q, k, v, softmax_scale, causal, window_size, options: as of :func:`forward`.
        out, softmax_lse: what forward returned, or what :func:`merge` made of several.
        dlse: gradient of softmax_lse, like it; default: none.
        deterministic: as of :func:`flash_attn_cuda.flash_attn_func`.
        needs_dbias: whether to compute the gradient of attn_bias.

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
    dq, dk, dv, dbias = _ops.general_backward(
        dout,
        None if dlse is None else statistics[1],
        *(q, k, v, out, statistics[0]),
        *tensors,
        *(softmax_scale, left, right, deterministic, _ops.allows_tf32(q), needs_dbias),
    )
    if packed:
        dq, dk, dv = dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)
    return Gradients(dq, dk, dv, dbias if needs_dbias else None)


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


def _tensors(options: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """In the order of the operator."""
    unknown = options.keys() - set(_OPTIONS) - _OTHER_NAMES.keys()
    if unknown:
        raise TypeError(f"expected options among {', '.join(_OPTIONS)}, got {sorted(unknown)}")
    check_optional(**options)
    named = {_OTHER_NAMES.get(name, name): tensor for name, tensor in options.items()}
    return tuple(named.get(name) for name in _OPTIONS)


def _with_batch(tensors: list[Tensor] | tuple[Tensor, ...], packed: bool) -> list[Tensor]:
    return [tensor.unsqueeze(0) if packed else tensor for tensor in tensors]
