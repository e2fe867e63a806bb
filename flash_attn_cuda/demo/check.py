# SPDX-License-Identifier: BSD-3-Clause
"""How far the output and the gradients are from float64, beside standard attention's own error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func
from flash_attn_cuda.demo.report import inputs
from flash_attn_cuda.reference import attention_ref, standard_attention

# The two round in different places, so one may err a little more than the other.
TOLERATED_RATIO = 3.0


@dataclass(frozen=True)
class Error:
    """Root mean square error of one result: a mean, since a largest error is largely luck."""

    name: str
    flash: float
    standard: float

    @property
    def tolerable(self) -> bool:
        return self.flash <= TOLERATED_RATIO * self.standard


def errors(device: str) -> list[Error]:
    """Causal attention with two query heads to a key head, forward and backward."""
    q, k, v = inputs(device, (2, 300, 8, 64), heads_kv=4)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)

    def results(attention: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        operands = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*operands, causal=True)
        return out, *torch.autograd.grad(out, operands, dout.to(dtype))

    exact = results(lambda *qkv, causal: attention_ref(*qkv, causal=causal)[0], torch.float64)
    flash = results(flash_attn_func, q.dtype)
    standard = results(standard_attention, q.dtype)
    return [
        Error(name, _root_mean_square(ours - truth), _root_mean_square(theirs - truth))
        for name, truth, ours, theirs in zip(
            ("output", "dq", "dk", "dv"), exact, flash, standard, strict=True
        )
    ]


def _root_mean_square(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()
