# SPDX-License-Identifier: BSD-3-Clause
"""A layer's cache of keys and values while a model generates, in plain tensor operations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What the layers of a model share while it generates; the caller counts the tokens.

    max_seqlen, max_batch_size: of the caches that MHA makes.
    seqlen_offset: how many tokens of each sequence the caches hold before a call.
    batch_size_offset: which row of the caches the first sequence of a call has.
    key_value_memory_dict: by layer_idx, (max_batch_size, max_seqlen, 2, heads_kv, head_dim).
    lengths_per_sample: (max_batch_size,) int32, in place of seqlen_offset where sequences differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew, in the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def offset_of(inference_params: InferenceParams, batch: int, seqlen: int) -> int | Tensor:
    """How many tokens of each of a call's sequences the caches hold before it: a number, or
    (batch,) int32."""
    first, max_batch_size = inference_params.batch_size_offset, inference_params.max_batch_size
    if not 0 <= first <= max_batch_size - batch:
        raise ValueError(
            f"batch_size_offset: expected room for {batch} sequences before max_batch_size "
            f"{max_batch_size}, got {first}"
        )
    room = inference_params.max_seqlen - seqlen
    message = f"expected room for {seqlen} tokens before max_seqlen {inference_params.max_seqlen}"
    lengths = inference_params.lengths_per_sample
    if lengths is None:
        offset = inference_params.seqlen_offset
        if not 0 <= offset <= room:
            raise ValueError(f"seqlen_offset: {message}, got {offset}")
        return offset
    if lengths.dim() != 1 or lengths.shape[0] < first + batch:
        raise ValueError(
            f"lengths_per_sample: expected shape ({max_batch_size},), got {tuple(lengths.shape)}"
        )
    lengths = lengths.narrow(0, first, batch).to(torch.int32)
    can_look = not (lengths.is_cuda or torch.compiler.is_compiling())
    if can_look and not ((lengths >= 0) & (lengths <= room)).all():
        raise ValueError(f"lengths_per_sample: {message}, got {lengths.tolist()}")
    return lengths


def append(
    kv: Tensor, inference_params: InferenceParams, layer_idx: int | None
) -> tuple[Tensor, Tensor | None]:
    """Write kv, (batch, seqlen, 2, heads_kv, head_dim), behind what the layer's cache holds.

    Returns the part of the cache in use, and how long each sequence is in it, (batch,) int32, or
    None where all of it counts.
    """
    batch, seqlen = kv.shape[:2]
    offset = offset_of(inference_params, batch, seqlen)
    cache = _cache_of(kv, inference_params, layer_idx)
    if not isinstance(offset, Tensor):
        cache.narrow(1, offset, seqlen).copy_(kv)
        return cache.narrow(1, 0, offset + seqlen), None
    sequences = torch.arange(batch, device=kv.device)[:, None]
    rows = offset[:, None] + torch.arange(seqlen, device=kv.device)
    # On CUDA nobody has looked at the lengths: wrong ones must not leave the cache.
    cache[sequences, rows % cache.shape[1]] = kv.to(cache.dtype)
    return cache, offset + seqlen


def _cache_of(kv: Tensor, inference_params: InferenceParams, layer_idx: int | None) -> Tensor:
    """Rows of the call's sequences in the layer's cache, which is made where there is none."""
    if layer_idx is None:
        raise ValueError("layer_idx: expected a number beside inference_params, got None")
    caches = inference_params.key_value_memory_dict
    least = (inference_params.max_batch_size, inference_params.max_seqlen)
    if layer_idx not in caches:
        caches[layer_idx] = kv.new_empty(*least, *kv.shape[2:])
    cache = caches[layer_idx]
    if cache.shape[2:] != kv.shape[2:] or cache.shape[0] < least[0] or cache.shape[1] < least[1]:
        raise ValueError(
            f"key_value_memory_dict[{layer_idx}]: expected shape {(*least, *kv.shape[2:])}, or "
            f"more sequences and rows, got {tuple(cache.shape)}"
        )
    return cache.narrow(0, inference_params.batch_size_offset, kv.shape[0])
