# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile of whole models: one graph, and no more compilations than for the first two
lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from flash_attn_cuda import hf
from tests.support.hf_models import MODELS, make_inputs, valid_rows

hf.register()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_one_graph_serves_all_lengths(name: str, padding: str, device: str) -> None:
    model = next(m for m in MODELS if m.name == name)
    eager, ours = (m.to(device) for m in model.make_pair())
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(sum("flash_attn_cuda" in str(n.target) for n in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(ours, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    for seqlen in (22, 25, 31):
        inputs: dict[str, Any] = make_inputs(model, padding, seqlen=seqlen)
        inputs = {k: x.to(device) for k, x in inputs.items()}
        logits = compiled(**inputs, use_cache=False).logits
        expected = eager(**inputs).logits
        rows = valid_rows(model, inputs, expected)
        torch.testing.assert_close(logits[rows], expected[rows], rtol=1e-4, atol=1e-4)
        gradients = [
            torch.autograd.grad(x[rows].square().sum(), list(m.parameters()))
            for x, m in ((logits, ours), (expected, eager))
        ]
        for got, wanted in zip(*gradients, strict=True):
            largest = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * largest)
    # Forward and backward of the first length, and of all others.
    assert graphs == 4 * [model.attentions]
