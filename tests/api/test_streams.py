# SPDX-License-Identifier: BSD-3-Clause
"""Streams, devices and CUDA graphs: the kernels run where PyTorch would run its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from tests.support.compare import assert_bitwise_equal, assert_within_bound, expected_with_bounds

pytestmark = pytest.mark.gpu

DELAY_CYCLES = 20_000_000  # some ten milliseconds: a kernel on the wrong stream overtakes it
NAMES = ("out", "dq", "dk", "dv")
KINDS = [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16)]


def _qkv(
    device: str = "cuda",
    seqlen: int = 300,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    return [
        torch.randn(2, seqlen, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    ]


def _step(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None, *, deterministic: bool = True
) -> tuple[Tensor, ...]:
    out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
    dout = torch.ones_like(out) if dout is None else dout
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def _assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, actual, wanted in zip(NAMES, got, expected, strict=True):
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


@pytest.mark.parametrize("options", ["", "softcap=5.0"])
def test_backward_may_be_the_first_work_of_autograds_thread(options: str) -> None:
    """Which has no CUDA context before."""
    program = f"""
import torch
from flash_attn_cuda import flash_attn_func
q, k, v, dout = torch.randn(4, 2, 200, 2, 64, device="cuda", dtype=torch.bfloat16)
out = flash_attn_func(q.requires_grad_(), k, v, {options})
torch.autograd.grad(out, q, dout)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


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


@pytest.mark.parametrize(("head_dim", "dtype"), KINDS, ids=str)
def test_two_streams_at_once_give_what_each_gives_alone(head_dim: int, dtype: torch.dtype) -> None:
    problems = [_qkv(seqlen=seqlen, head_dim=head_dim, dtype=dtype) for seqlen in (700, 1000)]
    alone = [_step(*qkv) for qkv in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    together: list[list[tuple[Tensor, ...]]] = [[] for _ in problems]
    for _ in range(50):
        for stream, qkv, results in zip(streams, problems, together, strict=True):
            with torch.cuda.stream(stream):
                results.append(_step(*qkv))
    torch.cuda.synchronize()
    for results, expected in zip(together, alone, strict=True):
        for got in results:
            _assert_same(got, expected)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), KINDS, ids=str)
def test_a_captured_graph_replays_on_new_data_a_thousand_times(
    head_dim: int, dtype: torch.dtype, deterministic: bool
) -> None:
    q, k, v = _qkv(head_dim=head_dim, dtype=dtype)
    data = (q, k, v, torch.randn_like(q))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(*data, deterministic=deterministic)  # may load code, which a capture forbids
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*data, deterministic=deterministic)
    for replay in range(1, 1001):
        for tensor in data:
            tensor.detach().normal_()
        graph.replay()
        if replay % 100:
            continue
        expected = expected_with_bounds(*(x.detach() for x in data), causal=True)
        eager = _step(*data, deterministic=deterministic)
        for name, actual, wanted in zip(NAMES, captured, eager, strict=True):
            assert_within_bound(name, actual, expected.values[name], expected.bounds[name])
            if deterministic or name != "dq":
                assert_bitwise_equal(name, actual, wanted)


# --- many more tiles than any GPU has multiprocessors, so that blocks share work ---


def _many_tiles(head_dim: int, seqlen: int) -> list[Tensor]:
    return [
        torch.randn(4, seqlen, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    ]


def _forward(qkv: list[Tensor]) -> Tensor:
    # The result likely gets this one's memory: a tile that no block takes must not find an earlier
    # result there.
    torch.full_like(qkv[0], float("nan"))
    return flash_attn_func(*qkv, causal=True)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return (a.view(torch.int16) != b.view(torch.int16)).any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_share_the_work_of_their_own_stream_alone(head_dim: int) -> None:
    problems = [_many_tiles(head_dim, seqlen) for seqlen in (2048, 2000)]
    alone = [_forward(qkv) for qkv in problems]
    differ = torch.zeros(len(problems), dtype=torch.bool, device="cuda")  # read at the end alone
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(300):
        for i, (stream, qkv) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                differ[i] |= _differ(_forward(qkv), alone[i])
    torch.cuda.synchronize()
    assert not differ.any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_replays_share_the_work_of_their_own_graph_alone(head_dim: int) -> None:
    in_graph, eager = (_many_tiles(head_dim, seqlen) for seqlen in (2048, 2000))
    expected_in_graph, expected_eager = _forward(in_graph), _forward(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [flash_attn_func(*in_graph, causal=True) for _ in range(2)]
    differ = torch.zeros(2, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(1000):
        with torch.cuda.stream(stream):
            differ[1] |= _differ(_forward(eager), expected_eager)
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
        for out in captured:
            differ[0] |= _differ(out, expected_in_graph)
    torch.cuda.synchronize()
    assert not differ.any()


# What may change between replays of a graph: values of these tensors.
def _lengths(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, 601, (2, 4), generator=generator).sort(dim=1).values
    first_rows = torch.nn.functional.pad(cuts, (1, 1))
    first_rows[:, -1] = 600
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), first_rows.int().cuda(), strict=True))


def _padding(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 301, (2, 2), generator=generator).int().cuda()
    return {"seqlens_q": lengths[0], "seqlens_k": lengths[1]}


def _masks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(4, 300, 300, generator=generator)
    documents = torch.randint(0, 6, (2, 300), generator=generator).sort(dim=1).values
    mask = torch.rand(2, 1, 300, 300, generator=generator) < 0.7
    return {
        "attn_bias": bias.to("cuda", torch.bfloat16).requires_grad_(),
        "attn_mask": mask.cuda(),
        "document_ids": documents.int().cuda(),
        "prefix_lens": torch.randint(0, 200, (2,), generator=generator).int().cuda(),
    }


RULES = {"lengths": _lengths, "padding": _padding, "masks": _masks}


def _ruled_step(qkv: list[Tensor], rules: dict[str, Tensor]) -> list[Tensor]:
    """out and all gradients, that of a bias too."""
    if "cu_seqlens_q" in rules:
        packed = [x.flatten(0, 1) for x in qkv]
        out = flash_attn_varlen_func(*packed, **rules, causal=True, deterministic=True)
    else:
        out = flash_attn_func(*qkv, **rules, causal=True, deterministic=True)
    inputs = [*qkv, *(x for x in rules.values() if x.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", RULES)
def test_a_captured_graph_follows_lengths_and_masks(kind: str, head_dim: int) -> None:
    qkv = _qkv(head_dim=head_dim)
    rules = RULES[kind](0)
    _ruled_step(qkv, rules)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _ruled_step(qkv, rules)
    for seed in range(10):
        for name, value in RULES[kind](seed).items():
            rules[name].detach().copy_(value.detach())
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        for got, expected in zip(captured, _ruled_step(qkv, rules), strict=True):
            assert_bitwise_equal(f"{kind} {seed}", got, expected)


@pytest.mark.parametrize("kind", RULES)
def test_the_host_does_not_wait_for_lengths_and_masks(kind: str) -> None:
    qkv, rules = _qkv(), RULES[kind](0)
    _ruled_step(qkv, rules)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _ruled_step(qkv, rules)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", RULES)
def test_lengths_and_masks_on_two_streams_at_once(kind: str) -> None:
    qkv = _qkv()
    all_rules = [RULES[kind](seed) for seed in range(2)]
    expected = [_ruled_step(qkv, rules) for rules in all_rules]
    streams = [torch.cuda.Stream() for _ in all_rules]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, rules in zip(streams, all_rules, strict=True):
            with torch.cuda.stream(stream):
                got.append(_ruled_step(qkv, rules))
        torch.cuda.synchronize()
        for results, wanted in zip(got, expected, strict=True):
            for actual, right in zip(results, wanted, strict=True):
                assert_bitwise_equal(kind, actual, right)
