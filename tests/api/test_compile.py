# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile: one graph, one compilation for all lengths, and the results of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.demo.gpt import GPT, GPTConfig
from tests.support.dropout import dropped_uniform, kept_in_both_passes, uniform_attention

LENGTHS = (64, 33, 65, 130)
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _one_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def _step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # Arithmetic of PyTorch's own around the operator, but no sum over a length: the code that
    # Inductor writes for one depends on how long it is.
    out, lse = flash_attn_func(q * 1.5, k, v, causal=True, deterministic=True, return_lse=True)
    return 2 * out, lse + 1


def _results(step: Step, device: str, seqlen: int) -> tuple[Tensor, ...]:
    """Both results and all gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(seqlen)
    q, k, v = (
        torch.randn(2, seqlen, 2, 16, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    out, lse = step(q, k, v)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (out.detach(), lse.detach()))
    return out.detach(), lse.detach(), *gradients


def test_one_graph_serves_all_lengths_and_equals_eager(device: str) -> None:
    compiled = torch.compile(_step, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in LENGTHS:
        for got, expected in zip(
            _results(compiled, device, seqlen), _results(_step, device, seqlen), strict=True
        ):
            assert torch.equal(got, expected)


def test_lengths_of_queries_and_keys_vary_apart(device: str) -> None:
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True, dynamic=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for seqlen_q, seqlen_k in ((8, 30), (9, 31), (40, 20), (100, 7)):
        q = torch.randn(2, seqlen_q, 4, 16, device=device, dtype=dtype)
        k = torch.randn(2, seqlen_k, 2, 16, device=device, dtype=dtype)
        assert torch.equal(compiled(q, k, k), flash_attn_func(q, k, k))


@pytest.mark.parametrize("setting", [False, True])
@pytest.mark.parametrize("argument", [False, True])
def test_deterministic_reaches_both_passes(argument: bool, setting: bool) -> None:
    told = []

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        told.extend(n.args[-2] for n in graph.graph.nodes if "flash_attn_cuda" in str(n.target))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(flash_attn_func, backend=aot_autograd(fw_compiler=note))
    qkv = [torch.randn(2, 40, 2, 16, requires_grad=True) for _ in range(3)]
    torch.use_deterministic_algorithms(setting)
    try:
        compiled(*qkv, deterministic=argument).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == 2 * [argument or setting]


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, attn_bias=2 * bias, attn_mask=mask, deterministic=True)


def test_rules_in_one_graph_for_all_lengths(device: str) -> None:
    compiled = torch.compile(_biased, backend="aot_eager", fullgraph=True, dynamic=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for seqlen in LENGTHS:
        q, k, v = (
            torch.randn(2, seqlen, 2, 16, device=device, dtype=dtype).requires_grad_()
            for _ in range(3)
        )
        bias = torch.randn(2, seqlen, seqlen, device=device).requires_grad_()
        mask = torch.rand(2, 1, seqlen, seqlen, device=device) < 0.7
        inputs = (q, k, v, bias)
        results = [
            (out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out)))
            for out in (step(*inputs, mask) for step in (compiled, _biased))
        ]
        assert all(map(torch.equal, *results))


def _dropped(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
    return flash_attn_func(
        *(q, k, v, 0.3),
        softcap=4.0,
        alibi_slopes=slopes,
        sinks=sinks,
        deterministic=True,
        return_lse=True,
        return_max_logit=True,
    )


def test_terms_in_one_graph_for_all_lengths(device: str) -> None:
    """Dropout draws from torch's generator as it does in eager mode."""
    compiled = torch.compile(_dropped, backend="aot_eager", fullgraph=True, dynamic=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for seqlen in LENGTHS:
        q, k, v = (
            torch.randn(2, seqlen, 2, 16, device=device, dtype=dtype).requires_grad_()
            for _ in range(3)
        )
        slopes, sinks = (torch.rand(2, device=device, dtype=dtype) for _ in range(2))
        inputs = (q, k, v, slopes.requires_grad_(), sinks.requires_grad_())
        results = []
        for step in (compiled, _dropped):
            torch.manual_seed(seqlen)
            out, lse, max_logit = step(*inputs)
            gradients = torch.autograd.grad((out, lse), inputs, (out.detach(), lse.detach()))
            results.append((out.detach(), lse.detach(), max_logit.detach(), *gradients))
        assert all(map(torch.equal, *results))
    torch.manual_seed(1)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_packed_sequences_in_one_graph_for_all_lengths(device: str) -> None:
    compiled = torch.compile(
        flash_attn_varlen_func, backend="aot_eager", fullgraph=True, dynamic=True
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for lengths in ((30, 50, 7), (41, 2, 9), (100, 33, 64)):
        first_rows = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        x = torch.randn(sum(lengths), 2, 16, device=device, dtype=dtype)
        arguments = (x, x, x, first_rows, first_rows, max(lengths), max(lengths))
        assert torch.equal(compiled(*arguments), flash_attn_varlen_func(*arguments))


@pytest.mark.slow
def test_inductor_equals_eager(device: str) -> None:
    compiled = torch.compile(_step, fullgraph=True, dynamic=True)
    for seqlen in LENGTHS:
        for got, expected in zip(
            _results(compiled, device, seqlen), _results(_step, device, seqlen), strict=True
        ):
            torch.testing.assert_close(got, expected)


def _train(device: str, *, compiled: bool) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of a few steps of a transformer block."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(layers=1, heads=2, width=32)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    step = optimizer.step
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True)
        step = torch.compile(step)
    losses = []
    for _ in range(4):
        loss = loss_of(torch.randint(256, (2, 41), device=device))
        loss.backward()
        step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [x.detach() for x in model.parameters()]


@pytest.mark.slow
def test_a_compiled_block_trains_as_in_eager_mode(device: str) -> None:
    losses, parameters = _train(device, compiled=True)
    expected_losses, expected_parameters = _train(device, compiled=False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_inductor_drops_the_same_in_both_passes_and_anew_in_each_call(device: str) -> None:
    compiled = torch.compile(lambda q, k, v: 1.0 * dropped_uniform(q, k, v), fullgraph=True)
    masks = [kept_in_both_passes(compiled, *uniform_attention(device)) for _ in range(4)]
    assert len({mask.cpu().numpy().tobytes() for mask in masks}) == len(masks)
