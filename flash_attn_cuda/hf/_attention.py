# SPDX-License-Identifier: BSD-3-Clause
"""The attention of a layer of a transformers model, with the masks of _masks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_cuda.functional import flash_attn_func
from flash_attn_cuda.hf._packing import documents_of
from flash_attn_cuda.hf._versions import BEFORE_5
from flash_attn_cuda.varlen import flash_attn_varlen_func


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers.AttentionInterface calls.

    Args:
        module: the layer; its is_causal counts where the argument is None.
        query: (batch, heads, seqlen_q, head_dim), any strides. Where dtypes differ, as rotary
            embeddings in float32 leave them, all become the 16-bit one.
        key: (batch, heads_kv, seqlen_k, head_dim).
        value: (batch, heads_kv, seqlen_k, head_dim_v).
        attention_mask: a mask as _masks.py has them; or one of the model's own or its user's, bool
            or to be added to the scores, (batch or 1, heads or 1, seqlen_q, seqlen_k) or longer in
            its last dimension, which says everything.
        dropout: probability that a probability is dropped.
        scaling: factor of the products; default head_dim ** -0.5.
        is_causal: as of flash_attn_cuda.
        sliding_window: distance of the first key that is too far away; None is without.
        softcap: as of flash_attn_cuda; None is without.
        s_aux: (heads,) sinks, with a gradient.
        position_bias: (batch or 1, heads or 1, seqlen_q, seqlen_k), added to the scores, with a
            gradient.
        head_mask: a factor for each head, (heads, 1, 1) or (batch or 1, heads, 1, 1).
        deterministic: as of flash_attn_cuda.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,): the batch's rows, one after another, are
            packed sequences.
        position_ids: (batch or 1, seqlen). Where there is no mask and no earlier key, a row that
            begins again where it began has packed sequences, if the layer is causal.
        output_attentions: only False.
        others: what models tell other implementations.

    Returns:
        (out, None); out is (batch, seqlen_q, heads, head_dim_v).

    Raises:
        ValueError: output_attentions; one of cu_seq_lens_q and cu_seq_lens_k.
        NotImplementedError: a choice of keys for each query, or sinks for each of them; padding or
            a bias beside cu_seq_lens_q.
    """
    _refuse(output_attentions, others)
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        absent = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"{absent}: expected a tensor, as the other side has one, got None")
    q, k, v = (x.transpose(1, 2) for x in _of_one_dtype(query, key, value))
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "deterministic": bool(deterministic),
    }
    is_complete = attention_mask is not None and attention_mask.dim() == 4
    if not is_complete:
        causal = _is_causal(module, is_causal, attention_mask)
        options.update(causal=causal)
        if causal and attention_mask is None and cu_seq_lens_q is None:
            attention_mask = documents_of(position_ids, q, k)
        if sliding_window is not None:
            options.update(window_size=(sliding_window - 1, 0 if causal else sliding_window - 1))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and not is_complete:
        if attention_mask is not None and attention_mask.dtype is not torch.int32:
            raise NotImplementedError(
                "attention_mask: fa_cuda has none for sequences packed by cu_seq_lens_q, which "
                "have no padding"
            )
        out = _packed(q, k, v, cu_seq_lens_q, cu_seq_lens_k, position_bias, options)
    else:
        if attention_mask is not None and not is_complete:
            keys = attention_mask.shape[1]  # those beyond are of a cache not yet filled
            k, v = k[:, :keys], v[:, :keys]
        options.update(_rules(attention_mask, position_bias, k))
        out = flash_attn_func(q, k, v, **options)
    return (out if head_mask is None else out * _of_heads(head_mask)), None


def _refuse(output_attentions: bool | None, others: dict[str, Any]) -> None:
    if output_attentions:
        raise ValueError(
            "output_attentions: expected False, got True; fa_cuda never holds the probabilities "
            "that it asks for. Load the model with attn_implementation='eager', or unpatch it"
        )
    for name in ("indices", "block_indices", "sinks"):
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{name}: fa_cuda has no attention with these for each query; use another "
                "attn_implementation for this model"
            )


def _of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return tensors
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _is_causal(module: nn.Module, is_causal: bool | None, attention_mask: Tensor | None) -> bool:
    by_layer = bool(getattr(module, "is_causal", True))
    if is_causal is None:
        return by_layer
    # Before 5, some models say False where they think that the mask says it.
    is_crossed = getattr(module, "is_cross_attention", False)
    if BEFORE_5 and attention_mask is not None and by_layer and not is_crossed:
        return True
    return bool(is_causal)


def _rules(
    attention_mask: Tensor | None, position_bias: Tensor | None, k: Tensor
) -> dict[str, Tensor | None]:
    """The mask and the bias as flash_attn_func names them."""
    keys = k.shape[1]
    bias = None if position_bias is None else position_bias[..., :keys]
    if attention_mask is None:
        return {"attn_bias": bias}
    if attention_mask.dim() == 4:
        mask = attention_mask[..., :keys]
        if mask.dtype is torch.bool:
            return {"attn_bias": bias, "attn_mask": mask}
        return {"attn_bias": mask if bias is None else bias + mask}
    if attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected 2 dimensions (batch, keys) or 4 (batch, heads, queries, "
            f"keys), got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype is torch.int32:
        return {"attn_bias": bias, "document_ids": attention_mask}
    return {"attn_bias": bias, "key_padding_mask": attention_mask.bool()}


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if position_bias is not None:
        raise NotImplementedError(
            "position_bias: fa_cuda has none for sequences packed by cu_seq_lens_q; pack by "
            "position_ids, or pad"
        )
    of_batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    lengths = (cu_seqlens_q.int(), cu_seqlens_k.int())
    out: Tensor = flash_attn_varlen_func(q, k, v, *lengths, **options)
    return out.view(*of_batch, *out.shape[1:])


def _of_heads(head_mask: Tensor) -> Tensor:
    """A factor of probabilities as one of out, (batch or 1, 1, heads, 1)."""
    if head_mask.dim() not in (3, 4) or head_mask.shape[-2:] != (1, 1):
        raise NotImplementedError(
            "head_mask: fa_cuda takes a factor for each head, (heads, 1, 1) or (batch, heads, 1, "
            f"1), got shape {tuple(head_mask.shape)}"
        )
    return head_mask.reshape(-1, 1, head_mask.shape[-3], 1)
