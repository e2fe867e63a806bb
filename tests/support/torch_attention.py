# SPDX-License-Identifier: BSD-3-Clause
"""Inputs for torch's attention, and its math backend as what to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
LENGTHS = [(7, 7), (70, 70), (5, 9), (9, 5)]
LAYOUTS = ["bshd", "bhsd", "packed"]  # order in memory; packed: between others


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def make_qkv(
    device: str,
    seqlen_q: int = 7,
    seqlen_k: int = 7,
    heads_kv: int = 4,
    layout: str = "bshd",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(2, heads, seqlen, 16), with gradients."""

    def tensor(seqlen: int, heads: int) -> Tensor:
        x = torch.randn(2, seqlen, 3, heads, 16, device=device).to(dtype or dtype_of(device))
        x = x[:, :, 1].transpose(1, 2)
        if layout == "bshd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "bhsd":
            x = x.contiguous()
        return x.detach().requires_grad_()

    return tensor(seqlen_q, 4), tensor(seqlen_k, heads_kv), tensor(seqlen_k, heads_kv)


def math_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """float64; causal from the top left; GQA."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    mask = None if mask is None else mask.double()
    return torch.ops.aten._scaled_dot_product_attention_math(
        *(q.double(), k.double(), v.double()),
        *(mask, dropout_p, causal, kept),
        scale=scale,
        enable_gqa=True,
    )[0]


def compare(out: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Both, and the gradients of both."""
    tolerance = TOLERANCES[out.dtype]
    options = {"rtol": tolerance, "atol": tolerance}
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, **options)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    wanted = torch.autograd.grad(expected, inputs, dout.double())
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, **options)
