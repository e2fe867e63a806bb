# SPDX-License-Identifier: BSD-3-Clause
"""Streams, devices and CUDA graphs: the kernels run where PyTorch would run its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func
from tests.support.compare import assert_bitwise_equal

pytestmark = pytest.mark.gpu

SHAPE = (2, 300, 4, 64)
DELAY_CYCLES = 20_000_000  # some ten milliseconds: a kernel on the wrong stream overtakes it


def _qkv(device: str = "cuda") -> list[Tensor]:
    return [
        torch.randn(SHAPE, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]


def _step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out = flash_attn_func(q, k, v, causal=True, deterministic=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert_bitwise_equal(name, actual, wanted)


def test_runs_on_the_current_stream() -> None:
    qkv = _qkv()
    expected = _step(*qkv)
    late = [torch.zeros_like(x).requires_grad_() for x in qkv]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        for target, source in zip(late, qkv, strict=True):
            target.detach().copy_(source.detach())
        got = _step(*late)
    torch.cuda.current_stream().wait_stream(stream)
    _assert_same(got, expected)


def test_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    qkv = _qkv("cuda:0")
    expected = _step(*qkv)
    other = [x.detach().to("cuda:1").requires_grad_() for x in qkv]
    got = _step(*other)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    _assert_same(tuple(x.to("cuda:0") for x in got), expected)


def test_tensors_on_two_gpus_are_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = _qkv("cuda:0")
    with pytest.raises(ValueError, match="k: expected device cuda:0 like q, got cuda:1"):
        flash_attn_func(q, k.to("cuda:1"), v)


def test_a_captured_graph_replays_on_new_data() -> None:
    qkv = _qkv()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(*qkv)  # the first call may allocate and load code, which a capture forbids
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*qkv)
    for _ in range(3):
        for tensor in qkv:
            tensor.detach().normal_()
        graph.replay()
        _assert_same(captured, _step(*qkv))
