# SPDX-License-Identifier: BSD-3-Clause
"""Self- and cross-attention as modules without weights, under flash-attn's names: the functions of
this package with the settings of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda._arguments import NO_WINDOW, AttentionResult
from flash_attn_cuda.functional import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn_cuda.varlen import (
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


class _FlashAttention(torch.nn.Module):
    """The settings that self- and cross-attention share."""

    alibi_slopes: Tensor | None
    sinks: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = NO_WINDOW,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        *,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = torch.nn.Dropout(attention_dropout)
        self.window_size = window_size
        self.deterministic = deterministic
        self.softcap = softcap
        for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
            if isinstance(tensor, torch.nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _options(self, causal: bool | None, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
            "sinks": self.sinks,
            **given,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FlashAttention:
        """half(), to() and the like move slopes and sinks that are no parameters, but neither round
        them nor, where to_empty() makes memory for weights, forget them."""
        given = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in given.items():
            self._buffers[name] = buffer.to(getattr(self, name).device)
        return self

    def extra_repr(self) -> str:
        settings = {
            "causal": (self.causal, False),
            "softmax_scale": (self.softmax_scale, None),
            "window_size": (self.window_size, NO_WINDOW),
            "softcap": (self.softcap, 0.0),
            "deterministic": (self.deterministic, False),
        }
        words = [f"{name}={value}" for name, (value, usual) in settings.items() if value != usual]
        terms = {"alibi_slopes": self.alibi_slopes, "sinks": self.sinks}
        words += [f"{name}={tuple(x.shape)}" for name, x in terms.items() if x is not None]
        return ", ".join(words)


class FlashSelfAttention(_FlashAttention):
    """Attention of one packed tensor, with the settings of a layer.

    Args:
        causal, softmax_scale, window_size, alibi_slopes, deterministic, softcap, sinks: as of
            :func:`flash_attn_cuda.flash_attn_func`. Slopes and sinks are learned where they are
            torch.nn.Parameter; else they are no part of the state dict, and keep their dtype
            whatever the module's.
        attention_dropout: dropout_p in training mode; there is no dropout in evaluation mode.
    """

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        **options: Any,
    ) -> AttentionResult:
        """Attend.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or (total, 3, heads, head_dim) with
                cu_seqlens.
            causal: default: the module's.
            cu_seqlens: (batch + 1,) int32, the first row of each packed sequence, and the end.
            max_seqlen: not needed, and not read; flash-attn's callers pass it.
            options: other keyword arguments of
                :func:`flash_attn_cuda.flash_attn_qkvpacked_func`, such as key_padding_mask,
                attn_bias and document_ids, or of
                :func:`flash_attn_cuda.flash_attn_varlen_qkvpacked_func` with cu_seqlens.

        Returns:
            (batch, seqlen, heads, head_dim), or (total, heads, head_dim).
        """
        options = self._options(causal, options)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_FlashAttention):
    """Attention of queries to packed keys and values; arguments as of
    :class:`FlashSelfAttention`."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | Tensor | None = None,
        **options: Any,
    ) -> AttentionResult:
        """Attend.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, heads_kv, head_dim), or (total_k, 2, heads_kv, head_dim).
            causal: default: the module's. Windows are aligned at the bottom right.
            cu_seqlens, cu_seqlens_k: (batch + 1,) int32, the first row of each packed sequence of
                q and of kv, and the end: both or none.
            max_seqlen, max_seqlen_k: not needed, and not read; flash-attn's callers pass them.
            options: as of :class:`FlashSelfAttention`.

        Returns:
            A tensor like q.
        """
        options = self._options(causal, options)
        if cu_seqlens is cu_seqlens_k is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        if cu_seqlens is None or cu_seqlens_k is None:
            absent = "cu_seqlens" if cu_seqlens is None else "cu_seqlens_k"
            raise ValueError(f"{absent}: expected a tensor, as the other side has one, got None")
        return flash_attn_varlen_kvpacked_func(
            *(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k), **options
        )
