# SPDX-License-Identifier: BSD-3-Clause
"""What torch makes CUDA graphs of by itself: torch.compile's reduce-overhead mode, and
make_graphed_callables, in training and with dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flash_attn_cuda import flash_attn_qkvpacked_func
from tests.support.dropout import dropped_uniform, kept_in_both_passes, uniform_attention

pytestmark = pytest.mark.gpu

STEPS = 12


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = torch.nn.Linear(128, 3 * 128, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(2, (3, 2, 64))
        return flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True).flatten(2)


def _x() -> Tensor:
    return torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def _assert_trains_alike(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for _ in range(STEPS):
        x = _x()
        results = []
        for module in (one, other):
            torch.compiler.cudagraph_mark_step_begin()
            out = module(x)
            inputs = (x, *module.parameters())
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
            results.append([result.detach().clone() for result in (out, *gradients)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1.6e-2, atol=2e-3)


def _assert_masks_differ(masks: list[Tensor]) -> None:
    assert len({mask.cpu().numpy().tobytes() for mask in masks}) == len(masks)


@pytest.fixture
def _no_skipped_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_skipped_graphs")
def test_reduce_overhead_trains_as_eager_mode_does() -> None:
    module = Attention()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    _assert_trains_alike(compiled, module)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_no_skipped_graphs")
def test_reduce_overhead_drops_anew_at_every_replay() -> None:
    compiled = torch.compile(
        lambda q, k, v: 1.0 * dropped_uniform(q, k, v), mode="reduce-overhead", fullgraph=True
    )
    qkv = uniform_attention("cuda")
    masks = []
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        masks.append(kept_in_both_passes(compiled, *qkv))
    _assert_masks_differ(masks)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_graphed_callables_train_as_eager_mode_does() -> None:
    module, graphed = Attention(), Attention()
    graphed.load_state_dict(module.state_dict())
    _assert_trains_alike(torch.cuda.make_graphed_callables(graphed, (_x(),)), module)


def test_graphed_callables_drop_anew_at_every_replay() -> None:
    qkv = uniform_attention("cuda")
    graphed = torch.cuda.make_graphed_callables(dropped_uniform, tuple(qkv))
    _assert_masks_differ([kept_in_both_passes(graphed, *qkv) for _ in range(STEPS)])
