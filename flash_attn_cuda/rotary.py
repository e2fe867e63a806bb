# SPDX-License-Identifier: BSD-3-Clause
"""Rotary position embeddings under flash-attn's names, in plain torch and differentiable.

RoFormer (Su et al., 2021), equation 34: pair i of channels, (a, b), at position t becomes
(a cos - b sin, a sin + b cos) of the angle t * base^(-2i / dim). With scale_base, xPos (Sun et al.,
2022), section 3.2.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]

Tables: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # cos and sin of queries, of keys


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first rotary_dim channels of each head by its position.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos, sin: (seqlen_ro, rotary_dim / 2), rotary_dim up to head_dim; a row for each position.
        interleaved: pairs are channels (0, 1), (2, 3), ... (GPT-J), not (0, rotary_dim / 2), ...
            (GPT-NeoX).
        inplace: write into x and return it.
        seqlen_offsets: position of the first row of each sequence: a number, or (batch,) integers.
        cu_seqlens: (batch + 1,) int32, first row of each of packed sequences, and their end. Rows
            of no sequence stay as they are.
        max_seqlen: not needed, and not read; flash-attn's callers pass it.

    Returns:
        A tensor like x; computed in float32 (float64 for float64).

    Raises:
        ValueError: a shape, or positions that cos and sin have no rows for. On CUDA, where looking
            at seqlen_offsets and cu_seqlens means waiting, and in compiled functions, rows at such
            positions stay as they are.
    """
    _check(x, cos, sin, 4 if cu_seqlens is None else 3)
    positions, exists = _positions(x, seqlen_offsets, cu_seqlens)
    fits = (positions >= 0) & (positions < cos.shape[0])
    if not x.is_cuda and not torch.compiler.is_compiling() and not (fits | ~exists).all():
        raise ValueError(
            f"cos, sin: expected a row for each position, got {cos.shape[0]} rows and positions "
            f"from {int(positions.min())} to {int(positions.max())}"
        )
    rows = positions.clamp(0, max(cos.shape[0] - 1, 0))
    rotary_dim = 2 * cos.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # (batch or 1, seqlen, 1, rotary_dim / 2), or without the batch
    cos, sin = (table.to(dtype)[rows].unsqueeze(-2) for table in (cos, sin))
    channels = x[..., :rotary_dim]
    rotated = _rotate(channels.to(dtype), cos, sin, interleaved).to(x.dtype)
    rotated = torch.where((fits & exists)[..., None, None], rotated, channels)
    if inplace:
        channels.copy_(rotated)
        return x
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys of a packed tensor in place, and return it.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or, with num_heads_q,
            (batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim).
        cos, sin, interleaved, seqlen_offsets: as of :func:`apply_rotary_emb`.
        cos_k, sin_k: of the keys; default: those of the queries.
        num_heads_q: of a tensor with all heads along one dimension: how many are of queries.
        cu_seqlens: as of :func:`apply_rotary_emb`; qkv then has `total` for (batch, seqlen).

    Raises:
        ValueError: as :func:`apply_rotary_emb`.
    """
    rows = "batch, seqlen" if cu_seqlens is None else "total"
    dim = rows.count(",") + 1  # that of heads, or of q, k and v
    if qkv.dim() == dim + 3 and qkv.shape[dim] == 3:
        q, k = qkv.select(dim, 0), qkv.select(dim, 1)
    elif (
        qkv.dim() == dim + 2 and num_heads_q is not None and (qkv.shape[dim] - num_heads_q) % 2 == 0
    ):
        num_heads_k = (qkv.shape[dim] - num_heads_q) // 2
        q, k = qkv.narrow(dim, 0, num_heads_q), qkv.narrow(dim, num_heads_q, num_heads_k)
    else:
        raise ValueError(
            f"qkv: expected shape ({rows}, 3, heads, head_dim), or ({rows}, num_heads_q + 2 * "
            f"num_heads_k, head_dim) with num_heads_q, got {tuple(qkv.shape)} and num_heads_q "
            f"{num_heads_q}"
        )
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets, cu_seqlens)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets, cu_seqlens)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rotate the keys of a packed tensor in place, and return it.

    Args:
        kv: (batch, seqlen, 2, heads, head_dim), or (total, 2, heads, head_dim) with cu_seqlens.
        cos, sin, interleaved, seqlen_offsets, cu_seqlens: as of :func:`apply_rotary_emb`.

    Raises:
        ValueError: as :func:`apply_rotary_emb`.
    """
    rows = "batch, seqlen" if cu_seqlens is None else "total"
    if kv.dim() != rows.count(",") + 4 or kv.shape[-3] != 2:
        raise ValueError(f"kv: expected shape ({rows}, 2, heads, head_dim), got {tuple(kv.shape)}")
    apply_rotary_emb(kv.select(-3, 0), cos, sin, interleaved, True, seqlen_offsets, cu_seqlens)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys in place, with tables of cos and sin that grow as needed. Functions
    that torch.compile or torch.export has traced make theirs at every call.

    Args:
        dim: rotary_dim, even.
        base: of the angles, base^(-2i / dim) for each step of position.
        interleaved: as of :func:`apply_rotary_emb`.
        scale_base: with a number, xPos: queries grow and keys shrink with position, by
            ((2i / dim + 0.4) / 1.4)^((t - middle) / scale_base).
        pos_idx_in_fp32: compute angles in float32 whatever the module's dtype; else in its own.
        device: of the tables.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2 != 0:
            raise ValueError(f"dim: expected a positive even number, got {dim}")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        share = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        self.register_buffer("inv_freq", self.base**-share, persistent=False)
        self._tables: Tables | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place and return what was given.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or as of :func:`apply_rotary_emb_qkv_` with
                num_heads_q; beside kv, queries alone, (batch, seqlen, heads, head_dim).
            kv: (batch, seqlen, 2, heads_kv, head_dim), or None.
            seqlen_offset: position of the first row: a number, or (batch,) integers.
            max_seqlen: how many positions the tables are to have; needed where seqlen_offset is a
                tensor, unless they have them already.
            cu_seqlens: (batch + 1,) int32, first row of each of packed sequences, and their end.
                Tensors then have a dimension `total` in place of (batch, seqlen), and max_seqlen
                is total by default. Rows of no sequence stay as they are.

        Raises:
            ValueError: as :func:`apply_rotary_emb`, and, while traced, where max_seqlen is needed.
        """
        seqlen = qkv.shape[1 if cu_seqlens is None else 0]
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = seqlen + seqlen_offset
        if max_seqlen is None and torch.compiler.is_compiling():
            raise ValueError(
                "max_seqlen: expected a number beside a tensor seqlen_offset, got None"
            )
        cos, sin, cos_k, sin_k = self._tables_for(max_seqlen or seqlen, qkv)
        if kv is None:
            return apply_rotary_emb_qkv_(
                *(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q),
                cu_seqlens=cu_seqlens,
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset, cu_seqlens)
        apply_rotary_emb_kv_(
            kv, cos_k, sin_k, self.interleaved, seqlen_offset, cu_seqlens=cu_seqlens
        )
        return q, kv

    def _tables_for(self, seqlen: int, like: Tensor) -> Tables:
        """cos and sin of queries and of keys, (seqlen or more, dim / 2), of dtype and device of
        `like`. Those of xPos depend on where the middle is, so they are of seqlen exactly."""
        if torch.compiler.is_compiling():
            # Tables kept from call to call would be guarded, and so compiled anew as they grow.
            return self._new_tables(seqlen, like)
        if self._tables is not None:
            old = self._tables[0]
            enough = old.shape[0] >= seqlen if self.scale_base is None else old.shape[0] == seqlen
            if enough and (old.device, old.dtype) == (like.device, like.dtype):
                return self._tables
        self._tables = self._new_tables(seqlen, like)
        return self._tables

    def _new_tables(self, seqlen: int, like: Tensor) -> Tables:
        dtype = torch.float32 if self.pos_idx_in_fp32 else self.inv_freq.dtype
        positions = torch.arange(seqlen, device=like.device, dtype=dtype)
        share = torch.arange(0, self.dim, 2, device=like.device, dtype=dtype) / self.dim
        # Not inv_freq in float32, which module.half() rounds.
        frequencies = self.base**-share if self.pos_idx_in_fp32 else self.inv_freq.to(like.device)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            cos, sin = cos.to(like.dtype), sin.to(like.dtype)
            return cos, sin, cos, sin
        power = (positions - seqlen // 2) / self.scale_base
        scale = ((share + 0.4) / 1.4) ** power[:, None]
        tables = (cos * scale, sin * scale, cos / scale, sin / scale)
        cos, sin, cos_k, sin_k = (table.to(like.dtype) for table in tables)
        return cos, sin, cos_k, sin_k


def _check(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> None:
    if x.dim() != dims:
        form = "(batch, seqlen, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
        raise ValueError(f"x: expected shape {form}, got {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "cos, sin: expected one shape (seqlen_ro, rotary_dim / 2), got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos, sin: expected rotary_dim up to head_dim {x.shape[-1]}, got {2 * cos.shape[1]}"
        )


def _positions(
    x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The position of each row and whether it is of a sequence: (batch or 1, seqlen), or (total,)
    with cu_seqlens."""
    if cu_seqlens is None:
        rows = torch.arange(x.shape[1], device=x.device)[None]
        if isinstance(seqlen_offsets, Tensor):
            rows = rows + _of_batch(seqlen_offsets, x.shape[0])[:, None]
        else:
            rows = rows + seqlen_offsets
        return rows, torch.ones_like(rows, dtype=torch.bool)
    rows = torch.arange(x.shape[0], device=x.device)
    batch = cu_seqlens.shape[0] - 1
    if batch == 0:
        return rows, torch.zeros_like(rows, dtype=torch.bool)
    ends = cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, rows, right=True)
    exists = (sequence < batch) & (rows >= cu_seqlens[0])
    sequence = sequence.clamp(max=batch - 1)
    positions = rows - cu_seqlens.long()[sequence]
    if isinstance(seqlen_offsets, Tensor):
        return positions + _of_batch(seqlen_offsets, batch)[sequence], exists
    return positions + seqlen_offsets, exists


def _of_batch(seqlen_offsets: Tensor, batch: int) -> Tensor:
    if seqlen_offsets.shape != (batch,):
        raise ValueError(
            f"seqlen_offsets: expected a number or shape ({batch},), got "
            f"{tuple(seqlen_offsets.shape)}"
        )
    return seqlen_offsets


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
