# SPDX-License-Identifier: BSD-3-Clause
"""Attention that shows in its results which pairs dropout keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func

SIZE = 64  # queries, keys and head_dim


def uniform_attention(device: str) -> list[Tensor]:
    """q, k and v, (1, SIZE, 2, SIZE), of which every query sees every key alike, and channel j of v
    is key j."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = torch.zeros(2, 1, SIZE, 2, SIZE, device=device, dtype=dtype)
    v = torch.eye(SIZE, device=device, dtype=dtype)[None, :, None].repeat(1, 1, 2, 1)
    return [q, k, v.requires_grad_()]


def dropped_uniform(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, dropout_p=0.5)


def kept_in_both_passes(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(1, heads, SIZE, SIZE), True where kept in forward: what backward keeps agrees."""
    out = function(q, k, v)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    kept = (out != 0).transpose(1, 2).clone()
    queries = (dv[..., 0].float() * SIZE / 2).round()  # that keep a key: (1, keys, heads)
    assert torch.equal(queries.transpose(1, 2), kept.sum(2).float())
    assert 0.45 < kept.float().mean() < 0.55
    return kept
