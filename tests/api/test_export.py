# SPDX-License-Identifier: BSD-3-Clause
"""torch.export of every public function, for all lengths: decomposed, saved, loaded and run; and
compiled ahead of time."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from flash_attn_cuda import flash_attn_func
from tests.support.calls import CALLS, Make

FIRST, OTHER = 264, 330
# Other calls of the same functions take much longer to trace than they tell.
LONG = {"rotary.apply_rotary_emb: packed", "rotary.RotaryEmbedding"}
EXPORTED = [(name, False) for name in CALLS if name not in LONG]
STRICT = [("flash_attn_func: all", True), ("lowlevel.backward", True)]


class Module(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def _export(run: Callable[..., Any], inputs: list[Any], strict: bool) -> ExportedProgram:
    """With all dimensions of more than one row dynamic, but those that the function fixes."""
    dims = [
        {d: Dim.AUTO for d, size in enumerate(x.shape) if size > 1}
        if isinstance(x, Tensor)
        else Dim.AUTO
        for x in inputs
    ]
    return torch.export.export(
        Module(run), tuple(inputs), dynamic_shapes=(tuple(dims),), strict=strict
    )


def _assert_equal(got: Any, expected: Any) -> None:
    got, expected = (x if isinstance(x, (tuple, list)) else [x] for x in (got, expected))
    for one, other in zip(got, expected, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
        else:
            assert one == other


@pytest.mark.parametrize(("name", "strict"), [*EXPORTED, *STRICT])
def test_saved_and_loaded_it_gives_the_same_for_all_lengths(
    device: str, name: str, strict: bool
) -> None:
    call = CALLS[name]
    program = _export(call.run, list(call.inputs(Make(FIRST, device))), strict)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs = list(call.inputs(Make(OTHER, device)))
    with torch.no_grad():
        torch.manual_seed(3)
        got = loaded(*inputs)
        torch.manual_seed(3)
        _assert_equal(got, call.run(*inputs))


def test_a_program_keeps_the_operator_and_has_gradients(device: str) -> None:
    make = Make(FIRST, device)
    program = _export(lambda q, k, v: flash_attn_func(q, k, v, causal=True), make.padded(), False)
    operators = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert operators.count("flash_attn_cuda.fwd.default") == 1
    q, k, v = Make(OTHER, device).padded()
    out = program.module()(q, k, v)
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out, expected)
    gradients = (
        torch.autograd.grad(x, (k, v), torch.ones_like(x), retain_graph=True)
        for x in (out, expected)
    )
    assert all(map(torch.equal, *gradients))


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, lse = flash_attn_func(2 * q, k, v, causal=True, return_lse=True)
        return out, lse, *flash_attn_func(q, k, v, attn_bias=bias, return_max_logit=True)

    def inputs(seqlen: int) -> list[Tensor]:
        make = Make(seqlen, "cpu")
        return [*make.padded(grad=False), make.x(4, seqlen, seqlen, grad=False)]

    program = _export(attention, inputs(FIRST), False)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "attention.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    for seqlen in (FIRST, OTHER, 40):
        tensors = inputs(seqlen)
        _assert_equal(compiled(*tensors), attention(*tensors))
