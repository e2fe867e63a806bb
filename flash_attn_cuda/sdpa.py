# SPDX-License-Identifier: BSD-3-Clause
"""torch's scaled_dot_product_attention on our kernels: an implementation of flash attention in
torch's registry (torch.nn.attention.register_flash_attention_impl), named "fa_cuda".

:func:`enable_sdpa` replaces the kernels of torch's flash operators. What of
torch.nn.functional.scaled_dot_product_attention, and so of torch.nn.MultiheadAttention and
TransformerEncoderLayer, reaches these operators is torch's choice, by torch 2.11 and 2.14:

- CUDA: bfloat16 or float16, on Ampere or newer; no attn_mask; one head_dim for q, k and v, up to
  256, which torch pads with zeros to a multiple of 8; a last dimension of stride 1; lengths above
  0; heads of k and v that divide those of q, with enable_gqa; any scale and dropout_p. is_causal
  only where seqlen_q == seqlen_k: torch's causal mask starts at the top left, that of the operator
  ends at the bottom right, as torch.nn.attention.bias.causal_lower_right asks for. Nested tensors
  of one head_dim that is a multiple of 8. All else goes to other kernels of torch, masks to cuDNN
  or to its memory-efficient kernel.
- CUDA, by default: of the kernels that can, torch takes the first in its order, which begins with
  cuDNN on Hopper and Blackwell where cuDNN is newer than 9.15.0. enable_sdpa() moves flash to the
  front; torch.nn.attention.sdpa_kernel() overrules that.
- CPU: float32, float64, bfloat16 or float16; attn_mask of two or four dimensions, without a
  gradient; one head_dim for q, k and v, of any size, where ours ends at 512; no dropout; strides,
  lengths and heads as above. is_causal with any lengths, from the top left. No nested tensors.
- Of 2.14 alone: inputs without a batch dimension, and one head of k and v without enable_gqa.
- MultiheadAttention gets there with need_weights=False. Its fast path for inference, and that of
  TransformerEncoderLayer, has operators of its own.
- torch.nn.attention.varlen.varlen_attn uses the flash operators, in 2.14 but for calls that go to
  cuDNN on Hopper and Blackwell: cuDNN from 9.18 on, max_q above 128, no window, no GQA, and
  head_dim a multiple of 8. While ours is enabled it runs on the CPU too.

What torch's operators promise holds: out and gradients have the strides that torch.compile expects,
those of the inputs, for which results are copied where an input is not laid out as (batch, seqlen,
heads, head_dim); softmax_lse is float32 (float64 for float64 inputs); rng_state holds what
:func:`flash_attn_cuda.lowlevel.new_rng_state` draws from torch's generator. A graph that
torch.compile traced earlier keeps the operators that it holds: flash operators run what is enabled
when the graph runs.

What our kernels or torch's operators cannot do raises, as forward-mode AD and double backward do,
and nothing falls back by itself. A row that an attn_mask hides with the smallest finite number in
place of -inf has the mean of v as output, but no gradient to rely on, as in torch's own kernel.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from flash_attn_cuda._aten_kernels import KERNELS

__all__ = ["disable_sdpa", "enable_sdpa"]

_NAME = "fa_cuda"
_registry = torch.nn.attention
_HAS_REGISTRY = hasattr(_registry, "register_flash_attention_impl")

# What disable_sdpa() activates again.
_previous: str | None = None


def enable_sdpa() -> AbstractContextManager[Any]:
    """Run torch's flash attention operators, and so scaled_dot_product_attention and varlen_attn
    where the module's documentation says so, on our kernels, in the whole process.

    Where there is a GPU this starts torch's CUDA context and moves flash to the front of torch's
    order of attention kernels. Another implementation that is active in torch's registry gives way
    until :func:`disable_sdpa`. Enabling twice is enabling once.

    Returns:
        A context manager, for those who want it: leaving it is :func:`disable_sdpa`, where this
        call has enabled.

    Raises:
        NotImplementedError: torch is older than 2.11.
    """
    global _previous
    if not _HAS_REGISTRY:
        raise NotImplementedError(
            "enable_sdpa: expected torch 2.11 or newer, which has a registry of flash attention "
            f"implementations, got torch {torch.__version__}"
        )
    previous = _registry.current_flash_attention_impl()
    if previous == _NAME:
        return contextlib.nullcontext()
    _registry.activate_flash_attention_impl(_NAME)
    _previous = previous
    stack = contextlib.ExitStack()
    stack.callback(disable_sdpa)
    return stack


def disable_sdpa() -> None:
    """Undo :func:`enable_sdpa`: torch's kernels, its order of them and the implementation that was
    active before. Does nothing where ours is not active."""
    global _previous
    if not _HAS_REGISTRY or _registry.current_flash_attention_impl() != _NAME:
        return
    _registry.restore_flash_attention_impl()
    previous, _previous = _previous, None
    if previous is not None:
        _registry.activate_flash_attention_impl(previous)


class _Replacement:
    """Our kernels in torch's operators, until removed: the handle that torch's registry keeps."""

    def __init__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():  # that kernels are replaced, as they are to be
            warnings.simplefilter("ignore", UserWarning)
            for device, kernels in KERNELS.items():
                for operator, kernel in kernels.items():
                    if hasattr(torch.ops.aten, operator):
                        self._library.impl(operator, kernel, device)  # type: ignore[no-untyped-call]
        self._order = _put_flash_first() if torch.cuda.is_available() else None

    def remove(self) -> None:
        self._library._destroy()  # type: ignore[no-untyped-call]
        if self._order is not None and _order() == _with_flash_first(self._order):
            torch._C._set_sdp_priority_order(self._order)


def _order() -> list[int]:
    return list(torch._C._get_sdp_priority_order())


def _with_flash_first(order: list[int]) -> list[int]:
    flash = int(SDPBackend.FLASH_ATTENTION)  # type: ignore[call-overload]
    return [flash, *(backend for backend in order if backend != flash)]


def _put_flash_first() -> list[int]:
    """Returns the order before."""
    # torch sets its own order when it first chooses, whatever was set before.
    x = torch.empty(1, 1, 8, 8, dtype=torch.bfloat16, device="cuda")
    torch._fused_sdp_choice(x, x, x)
    order = _order()
    torch._C._set_sdp_priority_order(_with_flash_first(order))
    return order


if _HAS_REGISTRY:
    _registry.register_flash_attention_impl(_NAME, register_fn=_Replacement)
