# SPDX-License-Identifier: BSD-3-Clause
"""Attention in plain PyTorch: what the kernels compute, written to be read rather than to be fast.

Both functions store the whole (seqlen_q, seqlen_k) matrix of scores, which FlashAttention
(Dao et al. 2022; FlashAttention-2, Dao 2023) avoids:

    S = softmax_scale * Q K^T,   P = softmax(S),   O = P V,   LSE = log(sum(exp(S))).

`attention_ref` is the yardstick of the tests; `standard_attention` is the usual implementation in
the precision of its inputs, which the demo and the benchmarks compare with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_ref", "standard_attention", "window_mask"]


def window_mask(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees: a (seqlen_q, seqlen_k) bool tensor, True where visible.

    Aligned at the bottom right, so that the last query sees the last key: with
    offset = seqlen_k - seqlen_q, query i sees key j iff
    i + offset - left <= j <= i + offset + right. A side of -1 is unbounded; `causal` sets right
    to 0.
    """
    left, right = window_size
    if causal:
        right = 0
    query = torch.arange(seqlen_q, device=device)[:, None]
    key = torch.arange(seqlen_k, device=device)[None, :]
    distance = key - (query + seqlen_k - seqlen_q)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    upcast: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Exact attention, computed in `upcast` and differentiable through both results.

    q is (batch, seqlen_q, heads, head_dim); k and v are (batch, seqlen_k, heads_kv, head_dim),
    where heads_kv divides heads and key head i serves the query heads of the i-th group.
    softmax_scale is 1 / sqrt(head_dim) by default. See `window_mask` for causal and window_size.

    Returns out, (batch, seqlen_q, heads, head_dim), and lse, (batch, heads, seqlen_q), the natural
    logarithm of each row's softmax denominator, both in `upcast`. A row that sees no key has
    out 0, lse -inf and gradients of 0.
    """
    q, k, v = q.to(upcast), k.to(upcast), v.to(upcast)
    k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    scale = _scale_or_default(softmax_scale, q.shape[3])
    mask = window_mask(
        q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
    )
    sees_nothing = ~mask.any(dim=1)

    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(~mask, -math.inf)
    # The logarithm of an empty sum is -inf, and its derivative is NaN. Rows without a key are
    # therefore taken out before the logarithm and put back after it.
    log_sum = torch.logsumexp(scores.masked_fill(sees_nothing[:, None], 0.0), dim=-1)
    probabilities = torch.exp(scores - log_sum.masked_fill(sees_nothing, 0.0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
    lse = log_sum.masked_fill(sees_nothing, -math.inf)
    return out, lse


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attention as usually written: matmul, softmax, matmul, each in the dtype of the inputs.

    Shapes and arguments as for `attention_ref`; returns out alone. Every row must see a key:
    softmax gives NaN for a row that sees none.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    scores = scores * _scale_or_default(softmax_scale, q.shape[3])
    if causal or tuple(window_size) != (-1, -1):
        mask = window_mask(
            seqlen_q, seqlen_k, causal=causal, window_size=window_size, device=q.device
        )
        scores = scores.masked_fill(~mask, -math.inf)
    out = torch.softmax(scores, dim=-1) @ v.transpose(1, 2)
    return out.transpose(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _scale_or_default(softmax_scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
