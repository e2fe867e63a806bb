# SPDX-License-Identifier: BSD-3-Clause
"""Selective activation checkpointing: a policy that names attention's operators keeps its results,
and gradients are those without checkpointing, dropout's among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.lowlevel import FORWARD_OPERATORS
from tests.support.operators import CountOperators

Function = Callable[..., Tensor]


def _keep_attention(_: object, operator: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in FORWARD_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


BY_POLICY = partial(create_selective_checkpoint_contexts, _keep_attention)
BY_LIST = partial(create_selective_checkpoint_contexts, list(FORWARD_OPERATORS))


def _padded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return 3 * flash_attn_func(2 * q, k, v, causal=True, deterministic=True, **options)


def _packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    first_rows = torch.tensor([0, 30, 70], device=q.device, dtype=torch.int32)
    rows = (first_rows, first_rows)
    q, k, v = (x.flatten(0, 1)[:70] for x in (2 * q, k, v))
    return 3 * flash_attn_varlen_func(q, k, v, *rows, deterministic=True, **options)


ATTENTION = {
    "plain": _padded,
    "dropout": partial(_padded, dropout_p=0.3),
    "packed": _packed,
    "packed, dropout": partial(_packed, dropout_p=0.3),
}

DROPPED = [ATTENTION["dropout"], ATTENTION["packed, dropout"]]


def _qkv(device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        torch.randn(2, 70, 2, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]


def _results(function: Function, qkv: list[Tensor]) -> tuple[Tensor, ...]:
    """out and the gradients of the sum of its squares."""
    torch.manual_seed(1)
    out = function(*qkv)
    torch.rand(5, device=out.device)  # what comes between the passes has no influence
    return out.detach(), *torch.autograd.grad(out.square().sum(), qkv)


@pytest.mark.parametrize("context", [BY_POLICY, BY_LIST, None], ids=["policy", "list", "all"])
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=list(ATTENTION))
def test_eager(device: str, attention: Function, context: Callable[[], Any] | None) -> None:
    qkv = _qkv(device)
    options = {} if context is None else {"context_fn": context}

    def checkpointed(*qkv: Tensor) -> Tensor:
        return checkpoint(attention, *qkv, use_reentrant=False, **options)

    expected = _results(attention, qkv)
    assert all(map(torch.equal, _results(checkpointed, qkv), expected))
    if device == "cpu":  # whose backward pass runs in this thread, where the count sees it
        with CountOperators() as count:
            _results(checkpointed, qkv)
        assert count.forward == (2 if context is None else 1)


@pytest.mark.parametrize("context", [BY_POLICY, BY_LIST, None], ids=["policy", "list", "all"])
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=list(ATTENTION))
def test_compiled(device: str, attention: Function, context: Callable[[], Any] | None) -> None:
    torch._dynamo.reset()
    qkv = _qkv(device)
    options = {} if context is None else {"context_fn": context}
    in_backward = []

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        in_backward.append(sum(n.target in FORWARD_OPERATORS for n in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        return make_boxed_func(graph.forward)

    @torch.compile(backend=aot_autograd(fw_compiler=keep, bw_compiler=note), fullgraph=True)
    def checkpointed(*qkv: Tensor) -> Tensor:
        return checkpoint(attention, *qkv, use_reentrant=False, **options)

    out, *gradients = got = _results(checkpointed, qkv)
    if device == "cpu" or attention not in DROPPED:
        assert all(map(torch.equal, got, _results(attention, qkv)))
    # On CUDA a graph that draws again in its backward pass has a generator of its own. But out is
    # linear in v, and this so by Euler's theorem, if both passes drop the same.
    loss = out.double().square().sum()
    torch.testing.assert_close(
        (qkv[2] * gradients[2]).double().sum(),
        2 * loss,
        rtol=2e-2 if device == "cuda" else 1e-5,
        atol=0,
    )
    assert in_backward == [1 if context is None else 0]
