# SPDX-License-Identifier: BSD-3-Clause
"""Kernels for torch's own flash attention operators, by our operators: the signatures of
aten::_scaled_dot_product_flash_attention and those akin to it, and what they promise of results, as
torch's native_functions.yaml and its fake kernels (torch/_meta_registrations.py) tell.

The names of arguments are torch's. rng_state, which backward gets from forward, holds what
:func:`flash_attn_cuda.lowlevel.new_rng_state` draws, in torch's dtype of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda import lowlevel


def _forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """out, softmax_lse and rng_state, which is of torch's dtype, and holds nothing where there is
    no dropout."""
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"value: expected head_dim {q.shape[-1]} like query, got {v.shape[-1]}: torch's "
            "operators have one for both"
        )
    out, softmax_lse, *state = lowlevel.forward(q, k, v, dropout_p=dropout_p, **options)
    rng_state = state[0].view(torch.uint64) if state else q.new_empty(2, dtype=torch.uint64)
    return out, softmax_lse, rng_state


def _laid_out_like(x: Tensor, result: Tensor) -> Tensor:
    """result with the strides of torch.empty_like(x), which compiled graphs count on."""
    if result.stride() == x.stride():
        return result
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)


def _transposed(*tensors: Tensor) -> list[Tensor]:
    """Between torch's (batch, heads, seqlen, head_dim) and our (batch, seqlen, heads, head_dim)."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _options(
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
) -> dict[str, Any]:
    window = (window_size_left, window_size_right)
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": tuple(-1 if side is None else side for side in window),
    }
    if cum_seq_q is not None:
        options.update(cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k)
    return options


def _check_without_gradient(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> None:
    """given: what torch's operator for the gradient does not get."""
    names = [name for name, tensor in given.items() if tensor is not None]
    if names and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise NotImplementedError(
            f"{', '.join(names)}: torch's flash operator has no gradient with it; call "
            "flash_attn_cuda.flash_attn_varlen_func, or use torch.no_grad()"
        )


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) or packed (total, heads, head_dim). num_splits is not
    needed: results never depend on other sequences of the batch."""
    if return_debug_mask or block_table is not None:
        name = "return_debug_mask" if return_debug_mask else "block_table"
        raise NotImplementedError(f"{name}: not implemented; leave the default, or disable_sdpa()")
    _check_without_gradient(query, key, value, seqused_k=seqused_k, alibi_slopes=alibi_slopes)
    options = _options(cum_seq_q, cum_seq_k, is_causal, scale, window_size_left, window_size_right)
    out, softmax_lse, rng_state = _forward(
        query, key, value, dropout_p, seqused_k=seqused_k, alibi_slopes=alibi_slopes, **options
    )
    unused, debug_mask = query.new_empty((), dtype=torch.uint64), query.new_empty(0)
    return _laid_out_like(query, out), softmax_lse, rng_state, unused, debug_mask


def _flash_forward_into(out: Tensor, *inputs: Any, **options: Any) -> Tensor:
    result, softmax_lse, *_ = _flash_forward(*inputs, **options)
    out.copy_(result)
    return softmax_lse


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    gradients = lowlevel.backward(
        *(grad_out, query, key, value, out, logsumexp),
        dropout_p=dropout_p,
        rng_state=rng_state.view(torch.int64) if dropout_p > 0.0 else None,
        **_options(cum_seq_q, cum_seq_k, is_causal, scale, window_size_left, window_size_right),
    )
    results = (gradients.dq, gradients.dk, gradients.dv)
    return tuple(map(_laid_out_like, (query, key, value), results))


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """is_causal ends at the bottom right."""
    q, k, v = _transposed(query, key, value)
    max_q, max_k = q.shape[1], k.shape[1]
    out, softmax_lse, *others = _flash_forward(
        q, k, v, None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), softmax_lse, None, None, max_q, max_k, *others


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    *others: Any,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    dout, q, k, v, o = _transposed(grad_out, query, key, value, out)
    gradients = _flash_backward(dout, q, k, v, o, logsumexp, None, None, *others, scale=scale)
    return tuple(_transposed(*gradients))


def _cpu_options(
    query: Tensor,
    key: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> dict[str, Any]:
    """is_causal starts at the top left: what ends at the bottom right of as many keys as queries,
    or, where there are more queries, is a window that reaches further to the right."""
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p: expected 0.0, got {dropout_p}: torch's flash operator for the CPU has no "
            "dropout"
        )
    options: dict[str, Any] = {"softmax_scale": scale, "attn_bias": attn_mask}
    if is_causal:
        batch, _, seqlen_q, _ = query.shape
        options["window_size"] = (-1, max(seqlen_q - key.shape[2], 0))
        if key.shape[2] > seqlen_q:
            options["seqlens_k"] = torch.full((batch,), seqlen_q, dtype=torch.int32)
    return options


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    options = _cpu_options(query, key, dropout_p, is_causal, attn_mask, scale)
    q, k, v = _transposed(query, key, value)
    out, softmax_lse, _ = _forward(q, k, v, 0.0, **options)
    # The memory of this operator's LSE is that of (batch, seqlen, heads).
    softmax_lse = softmax_lse.transpose(1, 2).contiguous().transpose(1, 2)
    return _laid_out_like(query, out.transpose(1, 2)), softmax_lse


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    options = _cpu_options(query, key, dropout_p, is_causal, attn_mask, scale)
    dout, q, k, v, o = _transposed(grad_out, query, key, value, out)
    gradients = lowlevel.backward(dout, q, k, v, o, logsumexp, **options)
    return tuple(_transposed(gradients.dq, gradients.dk, gradients.dv))


_FLASH_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
    "_flash_attention_backward": _flash_backward,
}
_CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}
# Torch has none for the CPU of the operators that are not named after it.
KERNELS = {"CUDA": _FLASH_KERNELS, "CPU": _FLASH_KERNELS | _CPU_KERNELS}
