# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the public functions with small random tensors, beside the same of the reference."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.reference import attention_ref, attention_varlen_ref

DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "alibi_slopes", "sinks")
PADDED = (
    *("attn_bias", "attn_mask", "key_padding_mask", "block_mask", "seqlens_q", "seqlens_k"),
    *("document_ids", "prefix_lens", "alibi_slopes", "sinks"),
)
PACKED = (
    *("attn_bias", "attn_mask", "block_mask", "seqused_q", "seqused_k", "prefix_lens"),
    *("alibi_slopes", "sinks"),
)
SIZES = ((5, 7), (66, 70), (70, 66), (130, 140))
BATCH = 2


@dataclass(frozen=True)
class RandomCall:
    """tensors: all of them by name, q, k and v first; options: what else the functions take."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        return "cu_seqlens_q" in self.tensors

    @property
    def differentiable(self) -> list[str]:
        return [name for name in self.tensors if name in DIFFERENTIABLE]

    def flash(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse, where some tensors are others than the call's own."""
        function = flash_attn_varlen_func if self.is_packed else flash_attn_func
        return function(**(self.tensors | tensors), **self.options, return_lse=True)

    def reference(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        function = attention_varlen_ref if self.is_packed else attention_ref
        return function(**(self.tensors | tensors), **self.options)


class Draw:
    """A generator of calls; the same seed gives the same."""

    def __init__(self, seed: int, device: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float64
        self.statistics_dtype = torch.float32 if device == "cuda" else torch.float64

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, dtype or self.dtype)

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.7).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        x = torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int32)
        return x.to(self.device)

    def some(self, names: Iterable[str], probability: float) -> list[str]:
        return [name for name in names if self.random.random() < probability]

    def call(
        self,
        names: Iterable[str] | None = None,
        *,
        packed: bool = False,
        sizes: tuple[int, int] | None = None,
    ) -> RandomCall:
        """names: of PADDED or PACKED, default some; sizes: seqlen_q and seqlen_k, alike."""
        if names is None:
            names = self.some(PACKED if packed else PADDED, 0.35)
        seqlen_q, seqlen_k = self.random.choice(SIZES) if sizes is None else sizes
        if "document_ids" in names:
            seqlen_k = seqlen_q
        heads = self.random.choice((2, 4))
        heads_kv = self.random.choice((heads, 1))
        head_dim, head_dim_v = self.random.choice(((3, 3), (4, 5)))
        rows = (BATCH, seqlen_q), (BATCH, seqlen_k)
        tensors = {}
        if packed:
            lengths = [self._packed_lengths(n) for n in (seqlen_q, seqlen_k)]
            rows = tuple((int(x[-1]) + 2,) for x in lengths)
            tensors = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True))
        tensors = {
            "q": self.normal(*rows[0], heads, head_dim),
            "k": self.normal(*rows[1], heads_kv, head_dim),
            "v": self.normal(*rows[1], heads_kv, head_dim_v),
        } | tensors
        for name in names:
            tensors[name] = self.tensor(name, seqlen_q, seqlen_k, heads)
        options = {
            "softmax_scale": 0.8,
            "softcap": self.random.choice((0.0, 2.0)),
            "window_size": self.random.choice(((-1, -1), (-1, 0), (40, 2))),
        }
        return RandomCall(tensors, options)

    def _packed_lengths(self, longest: int) -> Tensor:
        shortest = min(4, longest)
        lengths = [longest, *(self.random.randint(shortest, longest) for _ in range(BATCH - 1))]
        return torch.tensor([1, *lengths]).cumsum(0).to(self.device, torch.int32)

    def tensor(self, name: str, seqlen_q: int, seqlen_k: int, heads: int) -> Tensor:
        pairs = (BATCH, heads, seqlen_q, seqlen_k)
        if name in ("attn_bias", "attn_mask", "block_mask"):
            if name == "block_mask":
                pairs = (*pairs[:2], -(-seqlen_q // 128), -(-seqlen_k // 128))
            shape = [self.random.choice((size, size, 1)) for size in pairs]
            shape = shape[self.random.choice((0, 0, 1, 2)) :]
            return self.normal(*shape) if name == "attn_bias" else self.mask(*shape)
        if name in ("alibi_slopes", "sinks"):
            shape = self.random.choice(((heads,), (BATCH, heads)))
            shape = (heads,) if name == "sinks" else shape
            return self.normal(*shape, dtype=self.statistics_dtype)
        if name == "key_padding_mask":
            return self.mask(BATCH, seqlen_k)
        if name == "document_ids":
            return self.integers(0, 2, BATCH, seqlen_q)
        longest = seqlen_q if name.endswith("_q") else seqlen_k
        low, high = (4, longest) if name.startswith("seqlens") else (0, 4)
        return self.integers(low, high, BATCH)


def assert_close(got: Any, expected: Any) -> None:
    """In trees of tensors: exactly alike in float64, else as bfloat16 allows."""
    pairs = zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True
    )
    for one, other in pairs:
        assert one.shape == other.shape
        if one.dtype == torch.float64:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
            continue
        scale = float(other.double().nan_to_num(neginf=0.0).abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other.double(), rtol=0.03, atol=0.03 * max(scale, 1.0)
        )
