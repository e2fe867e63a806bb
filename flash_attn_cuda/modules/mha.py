# SPDX-License-Identifier: BSD-3-Clause
"""MHA, a layer of attention under flash-attn's names: projections, grouped heads, rotary positions,
ALiBi and a cache of keys and values around this package's functions. A checkpoint of flash-attn's
MHA loads into this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_cuda._arguments import NO_WINDOW
from flash_attn_cuda.modules.attention import FlashCrossAttention, FlashSelfAttention
from flash_attn_cuda.modules.kv_cache import InferenceParams, append, offset_of
from flash_attn_cuda.rotary import RotaryEmbedding

__all__ = ["MHA", "FlashCrossAttention", "FlashSelfAttention", "get_alibi_slopes"]


def get_alibi_slopes(num_heads: int) -> list[float]:
    """A slope for each head (Press et al., 2022, section 3): 2^(-8i / n) for i = 1, ..., n where n
    is a power of two. Else those of the next lower power, then every other one, from the first, of
    the next higher, as the authors' code has it.

    torch.tensor(get_alibi_slopes(num_heads)) is what `alibi_slopes` takes.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected 1 or more, got {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2.0 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]


class MHA(torch.nn.Module):
    """Multi-head attention with its projections, from hidden states to hidden states.

    The state dict has flash-attn's keys: Wqkv, of embed_dim + 2 * num_heads_kv * head_dim rows,
    those of all query heads before those of keys and of values; with cross_attn Wq and Wkv; and
    out_proj.

    Args:
        embed_dim: of inputs and outputs; head_dim is embed_dim / num_heads.
        num_heads: of queries.
        num_heads_kv: of keys and values, a divisor of num_heads (grouped queries); default: as
            many.
        cross_attn: queries are projected apart from keys and values, which may come from x_kv.
        qkv_proj_bias, out_proj_bias: whether projections have biases.
        dropout: of probabilities, in training mode alone.
        softmax_scale: default head_dim ** -0.5.
        causal, window_size: as of :func:`flash_attn_cuda.flash_attn_func`.
        layer_idx: this layer's key in inference_params; needed for decoding alone.
        rotary_emb_dim: how many channels of a head rotary positions turn, 0 to head_dim.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: base, scale_base and
            interleaved of :class:`flash_attn_cuda.rotary.RotaryEmbedding`.
        use_alibi: add ALiBi's biases, with the slopes of :func:`get_alibi_slopes`.
        use_flash_attn: for flash-attn's callers; without influence, as there is no other way.
        return_residual: return (output, x), for a residual connection that the caller makes.
        checkpointing: keep nothing of attention but its inputs for the backward pass, which runs
            attention again.
        device, dtype: of the weights.
        softcap: as of :func:`flash_attn_cuda.flash_attn_func`.
        dwconv, fused_bias_fc: only False.

    Raises:
        ValueError: sizes that do not divide or fit.
        NotImplementedError: dwconv, fused_bias_fc, and rotary positions with cross_attn.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = NO_WINDOW,
        fused_bias_fc: bool = False,
        use_flash_attn: bool = True,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.cross_attn = cross_attn
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        self._check_settings(dwconv=dwconv, fused_bias_fc=fused_bias_fc)
        self.head_dim = embed_dim // num_heads

        options: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.num_heads_kv * self.head_dim
        if cross_attn:
            self.Wq = torch.nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **options)
            self.Wkv = torch.nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **options)
        else:
            self.Wqkv = torch.nn.Linear(
                embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **options
            )
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **options)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                rotary_emb_base,
                rotary_emb_interleaved,
                rotary_emb_scale_base,
                device=device,
            )
        settings = (causal, softmax_scale, dropout, window_size)
        slopes = self._new_alibi_slopes() if use_alibi else None
        self.inner_attn = FlashSelfAttention(*settings, slopes, softcap=softcap)
        self.inner_cross_attn = FlashCrossAttention(*settings, slopes, softcap=softcap)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: with cross_attn, what keys and values come from; default: x.
            key_padding_mask: (batch, seqlen_k) bool, True where a key exists.
            cu_seqlens: (batch + 1,) int32, the first row of each packed sequence, and the end.
                Beside x_kv, also give cu_seqlens_k.
            max_seqlen: the longest packed sequence, or more: rotary tables have so many rows;
                default: total.
            mixer_subset: with cross_attn, an index of x along seqlen: which tokens are queries.
            inference_params: an :class:`InferenceParams` or alike. Keys and values join those in
                this layer's cache, and queries attend to all of them: decoding token by token is
                the whole forward pass. key_padding_mask is then of all keys, (batch, seqlen_offset
                + seqlen), or (batch, max_seqlen of the cache) with lengths_per_sample. Without
                gradients. Lengths that do not fit into the cache raise on the CPU; on CUDA, where
                looking at lengths_per_sample means waiting, results are wrong.
            kwargs: what else :class:`FlashSelfAttention` and :class:`FlashCrossAttention` take,
                such as attn_bias or document_ids.

        Returns:
            A tensor like x, of the rows of mixer_subset where given; with return_residual
            (output, x).
        """
        self._check_inputs(x, x_kv, key_padding_mask, cu_seqlens, mixer_subset, inference_params)
        inputs: tuple[Tensor, ...]
        if self.cross_attn:
            inputs = self._project_apart(x, x_kv, mixer_subset)
        else:
            inputs = self._project_together(x, cu_seqlens, max_seqlen, inference_params)
        if key_padding_mask is not None:
            kwargs["key_padding_mask"] = key_padding_mask
        if cu_seqlens is not None:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            if len(inputs) == 2 and x_kv is None:
                kwargs = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **kwargs}
        if inference_params is None:
            attention = self.inner_attn if len(inputs) == 1 else self.inner_cross_attn
            out = self._attend(attention, *inputs, **kwargs)
        else:
            q, kv = inputs
            out = self._attend_to_cache(q, kv, inference_params, **kwargs)
        out = self.out_proj(out.flatten(-2))
        return (out, x) if self.return_residual else out

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An empty cache for inference_params.key_value_memory_dict[layer_idx], (batch_size,
        max_seqlen, 2, num_heads_kv, head_dim), by default in the dtype of the weights."""
        size = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return self.out_proj.weight.new_empty(size, dtype=dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}"

    def _project_apart(
        self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any
    ) -> tuple[Tensor, Tensor]:
        """q and kv."""
        q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
        kv = self.Wkv(x if x_kv is None else x_kv)
        size = (2, self.num_heads_kv, self.head_dim)
        return torch.unflatten(q, -1, (-1, self.head_dim)), torch.unflatten(kv, -1, size)

    def _project_together(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | Tensor | None,
        inference_params: InferenceParams | None,
    ) -> tuple[Tensor, ...]:
        """qkv, whose gradient is then one tensor, or q and kv where their heads differ in number or
        keys go into a cache. Turned to their positions."""
        heads = torch.unflatten(self.Wqkv(x), -1, (-1, self.head_dim))
        if self.rotary_emb_dim > 0:
            offset: int | Tensor = 0
            length = None
            if inference_params is not None:
                offset = offset_of(inference_params, x.shape[0], x.shape[1])
                length = inference_params.max_seqlen
            elif cu_seqlens is not None and not isinstance(max_seqlen, Tensor):
                length = max_seqlen
            if heads.requires_grad:
                heads = heads.clone()  # autograd refuses writes into results of hooked modules
            self.rotary_emb(heads, None, offset, length, self.num_heads, cu_seqlens=cu_seqlens)
        if inference_params is None and self.num_heads == self.num_heads_kv:
            return (torch.unflatten(heads, -2, (3, self.num_heads)),)
        q, kv = heads.split_with_sizes([self.num_heads, 2 * self.num_heads_kv], -2)
        return q, torch.unflatten(kv, -2, (2, self.num_heads_kv))

    def _attend(self, attention: torch.nn.Module, *inputs: Tensor, **options: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(attention, *inputs, use_reentrant=False, **options)
        return attention(*inputs, **options)

    def _attend_to_cache(
        self, q: Tensor, kv: Tensor, inference_params: InferenceParams, **options: Any
    ) -> Any:
        """Append keys and values to the cache, and attend to all it holds."""
        if kv.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "inference_params: there are no gradients through a cache; decode under "
                "torch.no_grad() or torch.inference_mode()"
            )
        cache, lengths = append(kv, inference_params, self.layer_idx)
        return self.inner_cross_attn(q, cache, seqlens_k=lengths, **options)

    def _new_alibi_slopes(self) -> Tensor:
        """float32. On the CPU beside weights on the meta device, which have a device later."""
        slopes = torch.tensor(get_alibi_slopes(self.num_heads), dtype=torch.float32, device="cpu")
        device = self.out_proj.weight.device
        return slopes if device.type == "meta" else slopes.to(device)

    def _check_settings(self, **refused: bool) -> None:
        for name, given in refused.items():
            if given:
                raise NotImplementedError(f"{name}: expected False, there is no kernel for it")
        if self.num_heads < 1 or self.embed_dim % self.num_heads != 0:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv != 0:
            raise ValueError(
                f"num_heads_kv: expected a divisor of num_heads {self.num_heads}, got "
                f"{self.num_heads_kv}"
            )
        if self.rotary_emb_dim > 0 and self.cross_attn:
            raise NotImplementedError("rotary_emb_dim: expected 0 with cross_attn")
        head_dim = self.embed_dim // self.num_heads
        if not 0 <= self.rotary_emb_dim <= head_dim:
            raise ValueError(
                f"rotary_emb_dim: expected 0 to head_dim {head_dim}, got {self.rotary_emb_dim}"
            )

    def _check_inputs(
        self,
        x: Tensor,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        mixer_subset: Any,
        inference_params: InferenceParams | None,
    ) -> None:
        form = "(batch, seqlen, " if cu_seqlens is None else "(total, "
        for name, tensor in (("x", x), ("x_kv", x if x_kv is None else x_kv)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dim() != form.count(",") + 1 or tensor.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"{name}: expected shape {form}{self.embed_dim}), got {tuple(tensor.shape)}"
                )
        if not self.cross_attn:
            _expect_none("without cross_attn", x_kv=x_kv, mixer_subset=mixer_subset)
        if cu_seqlens is not None:
            _expect_none(
                "beside cu_seqlens",
                key_padding_mask=key_padding_mask,
                mixer_subset=mixer_subset,
                inference_params=inference_params,
            )
        if inference_params is not None:
            _expect_none("beside inference_params", x_kv=x_kv, mixer_subset=mixer_subset)


def _expect_none(place: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None {place}, got {type(value).__name__}")
