# SPDX-License-Identifier: BSD-3-Clause
"""What MHA computes, as usually written: torch's own scaled_dot_product_attention on a matrix of
biases, in float64, with the weights of a given MHA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from flash_attn_cuda.modules import MHA, get_alibi_slopes

Weights = dict[str, Tensor]


def weights_of(mha: MHA) -> Weights:
    """Copies in float64, leaves for gradients, on the CPU."""
    return {
        name: tensor.detach().cpu().double().requires_grad_()
        for name, tensor in mha.state_dict().items()
    }


def plain_mha(
    mha: MHA,
    weights: Weights,
    x: Tensor,
    x_kv: Tensor | None = None,
    *,
    seen: Tensor | None = None,
    rotary: dict[str, Any] | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi: bool = False,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """x (batch, seqlen, embed_dim) and x_kv in float64. seen: (batch, seqlen_k), where there are
    keys. rotary: arguments of `turned`."""
    x_kv = x if x_kv is None else x_kv
    q, k, v = _projected(mha, weights, x, x_kv)
    if rotary is not None:
        q = turned(q, mha.rotary_emb_dim, **rotary)
        k = turned(k, mha.rotary_emb_dim, **rotary, growth=-1)
    groups = mha.num_heads // mha.num_heads_kv
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
    off = k.shape[2] - q.shape[2]
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - off
    visible = torch.ones(x.shape[0], 1, *distance.shape, dtype=torch.bool)
    visible &= (distance >= -window[0]) | torch.tensor(window[0] < 0)
    visible &= (distance <= window[1]) | torch.tensor(window[1] < 0)
    if seen is not None:
        visible &= seen[:, None, None, :]
    bias = torch.zeros(visible.shape, dtype=torch.float64)
    if alibi:
        slopes = torch.tensor(get_alibi_slopes(mha.num_heads)).double()
        bias = bias - slopes[:, None, None] * distance.abs()
    scale = 1 / math.sqrt(mha.head_dim) if softmax_scale is None else softmax_scale
    if softcap != 0.0:
        scores = softcap * torch.tanh(scale * q @ k.mT / softcap) + bias
        out = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v
    else:
        bias = bias.masked_fill(~visible, -math.inf)
        out = scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return linear(
        out.transpose(1, 2).flatten(2), weights["out_proj.weight"], weights.get("out_proj.bias")
    )


def turned(
    x: Tensor,
    dim: int,
    base: float = 10000.0,
    interleaved: bool = False,
    scale_base: float = math.inf,
    growth: int = 1,
) -> Tensor:
    """Rotary positions from 0 on, of (batch, seqlen, heads, head_dim) in float64; with scale_base
    those of xPos, where queries grow as 1 and keys as -1."""
    channels = x[..., :dim]
    pairs = channels.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    share = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    positions = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
    lengths = ((share + 0.4) / 1.4) ** (growth * positions / scale_base)
    turns = torch.polar(lengths, positions * base**-share)[:, None]
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat([pairs.flatten(-2), x[..., dim:]], dim=-1)


def _projected(mha: MHA, weights: Weights, x: Tensor, x_kv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v: (batch, seqlen, heads, head_dim)."""
    of_q, of_kv = mha.num_heads * mha.head_dim, mha.num_heads_kv * mha.head_dim
    if mha.cross_attn:
        q = linear(x, weights["Wq.weight"], weights.get("Wq.bias"))
        k, v = linear(x_kv, weights["Wkv.weight"], weights.get("Wkv.bias")).split(of_kv, -1)
    else:
        qkv = linear(x, weights["Wqkv.weight"], weights.get("Wqkv.bias"))
        q, k, v = qkv.split([of_q, of_kv, of_kv], -1)
    return tuple(t.unflatten(-1, (-1, mha.head_dim)) for t in (q, k, v))
