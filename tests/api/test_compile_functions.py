# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile of every public function: one graph, no recompilation over lengths, and the results
and gradients of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_cuda
from flash_attn_cuda import bert_padding, explain, flash_attn_func, lowlevel, rotary
from tests.support.calls import CALLS, Call, Make, outcome

LENGTHS = (264, 133)  # with more than one block of a block mask
NOT_TRACED = {
    *("Decision", "Explanation", "__version__", "build_info", "explain"),
    *("disable_sdpa", "enable_sdpa"),
}
NOT_CALLED = {"lowlevel.FORWARD_OPERATORS", "lowlevel.Gradients"}


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()


def _compile(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(run, backend="aot_eager", fullgraph=True, **options)


def _assert_equals_eager(compiled: Callable[..., Any], call: Call, make: Make) -> None:
    inputs = list(call.inputs(make))
    for got, expected in zip(outcome(compiled, inputs), outcome(call.run, inputs), strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected)
        else:
            assert got == expected


def test_every_public_function_is_called() -> None:
    public = set(flash_attn_cuda.__all__) - NOT_TRACED
    for module in (bert_padding, lowlevel, rotary):
        short = module.__name__.rpartition(".")[2]
        public |= {f"{short}.{name}" for name in module.__all__}
    assert {name.partition(":")[0] for name in CALLS} == public - NOT_CALLED


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_all_lengths_and_equals_eager(device: str, name: str) -> None:
    call = CALLS[name]
    compiled = _compile(call.run, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in LENGTHS:
            _assert_equals_eager(compiled, call, Make(seqlen, device))


SOME = ("flash_attn_func", "flash_attn_func: all", "flash_attn_varlen_func: all")


@pytest.mark.parametrize(
    "name", [*SOME, "lowlevel.backward", "rotary.apply_rotary_emb", "bert_padding.pad_input"]
)
def test_without_dynamic_the_third_length_compiles_nothing(device: str, name: str) -> None:
    call = CALLS[name]
    compiled = _compile(call.run)
    for count, seqlen in enumerate((*LENGTHS, 330)):
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            _assert_equals_eager(compiled, call, Make(seqlen, device))


def test_windows_vary_without_recompilation(device: str) -> None:
    call = CALLS["flash_attn_func"]
    compiled = _compile(flash_attn_func, dynamic=True)
    qkv = list(call.inputs(Make(264, device)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in ((60, 5), (50, 20), (131, 7)):
            got = compiled(*qkv, window_size=window)
            assert torch.equal(got, flash_attn_func(*qkv, window_size=window))


def test_explain_breaks_the_graph_and_tells_the_same(device: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, str]:
        out = flash_attn_func(2 * q, k, v, causal=True)
        return out + 1, str(explain(q, k, v, causal=True))

    qkv = Make(40, device).padded()
    compiled = torch.compile(attention, backend="aot_eager")
    got, expected = compiled(*qkv), attention(*qkv)
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1]


def test_a_generator_breaks_the_graph_and_draws_the_same(device: str) -> None:
    generator = torch.Generator(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(2 * q, k, v, 0.3, generator=generator) + 1

    qkv = Make(40, device).padded()
    compiled = torch.compile(attention, backend="aot_eager")
    results = []
    for function in (compiled, attention):
        generator.manual_seed(5)
        results.append([function(*qkv), function(*qkv)])
    assert all(map(torch.equal, *results))
    assert not torch.equal(*results[0])


def test_compiled_rotary_keeps_no_tables(device: str) -> None:
    """What one graph made must not be what another one reads."""
    rotate = rotary.RotaryEmbedding(16)
    compiled = _compile(lambda qkv: rotate(qkv.clone()), dynamic=True)
    qkv = Make(40, device).x(2, 40, 3, 4, 16)
    expected = rotate(qkv.clone())
    tables = rotate._tables
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in (40, 20, 30):
            got = compiled(qkv[:, :seqlen].detach().contiguous())
            torch.testing.assert_close(got, expected[:, :seqlen].detach())
    assert rotate._tables is tables


def test_compiled_rotary_needs_a_length_beside_a_tensor_of_offsets() -> None:
    rotate = rotary.RotaryEmbedding(16)
    starts = torch.tensor([3, 0])
    compiled = _compile(lambda qkv: rotate(qkv.clone(), seqlen_offset=starts))
    with pytest.raises(Exception, match="max_seqlen: expected a number beside a tensor"):
        compiled(torch.randn(2, 40, 3, 4, 16))


def test_a_bad_argument_is_named(device: str) -> None:
    q, k, v = Make(40, device).padded()
    with pytest.raises(RuntimeError, match="ValueError: v: expected heads 4, got 2 in shape"):
        _compile(flash_attn_func)(q, torch.cat((k, k), 2), v)
