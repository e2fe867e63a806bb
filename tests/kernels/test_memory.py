# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory grows with the length of the sequence, not with its square."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func

SEQLEN = 8192
HEAD_DIM = 16
# A (seqlen, seqlen) buffer of the smallest kind, one byte an element, is four times this.
ALLOWED_BYTES = SEQLEN * SEQLEN // 4

# In a process of its own, since the peak of a process never falls. The short call first loads the
# code and starts the threads.
MEASURE_RSS = f"""
import resource
import torch
from flash_attn_cuda import flash_attn_func

def step(seqlen, backward):
    x = torch.randn(1, seqlen, 1, {HEAD_DIM}, requires_grad=backward)
    out = flash_attn_func(x, x, x, causal=True)
    if backward:
        out.sum().backward()

for backward in (False, True):
    step(128, backward)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step({SEQLEN}, backward)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """What other tests left to the allocator may be given out in pieces larger than asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def test_cpu_memory_is_linear_in_seqlen() -> None:
    pytest.importorskip("resource", reason="the peak of a process is read with it")
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE_RSS], check=True, capture_output=True, text=True
    ).stdout
    forward, backward = map(int, printed.split())
    assert forward < ALLOWED_BYTES
    assert backward < ALLOWED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_cuda_memory_is_linear_in_seqlen(backward: bool) -> None:
    x = torch.randn(1, SEQLEN, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = flash_attn_func(x, x, x, causal=True)
    if backward:
        out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < ALLOWED_BYTES


def _rules(kind: str) -> dict[str, Tensor]:
    half = torch.tensor([SEQLEN // 2], device="cuda", dtype=torch.int32)
    if kind == "lengths":
        return {"seqlens_q": half, "seqlens_k": half}
    if kind == "documents":
        ids = torch.arange(SEQLEN, device="cuda", dtype=torch.int32)[None] // 1000
        return {"document_ids": ids, "prefix_lens": half}
    blocks = SEQLEN // 128
    return {"block_mask": torch.rand(blocks, blocks, device="cuda") < 0.3}


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "documents", "blocks"])
def test_rules_need_no_matrix(kind: str, backward: bool) -> None:
    x = torch.randn(1, SEQLEN, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
    rules = _rules(kind)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = flash_attn_func(x, x, x, causal=True, **rules)
    if backward:
        out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < ALLOWED_BYTES


def _mask_of_pairs(kind: str) -> Tensor:
    if kind == "overlapping":
        return (torch.rand(2 * SEQLEN, device="cuda") < 0.5).as_strided(
            (1, 1, SEQLEN, SEQLEN), (0, 0, 1, 1)
        )
    shape = (8, 8, 2, 2 * SEQLEN) if kind == "few queries" else (1, 4, SEQLEN // 2, SEQLEN // 2)
    return torch.empty(shape, device="cuda", dtype=torch.bool).bernoulli_(0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("kind", "share"), [("whole", 8), ("few queries", 1), ("overlapping", 1)])
def test_a_mask_of_pairs_needs_no_more_than_it_has(kind: str, share: int, backward: bool) -> None:
    mask = _mask_of_pairs(kind)
    batch, heads, seqlen_q, seqlen_k = mask.shape
    q = torch.randn(batch, seqlen_q, heads, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, seqlen_k, 1, 64, device="cuda", dtype=torch.bfloat16)
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def peak(**rules: Tensor) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = flash_attn_func(*inputs, **rules)
        if backward:
            torch.autograd.grad(out.sum(), inputs)
        return torch.cuda.max_memory_allocated() - before

    # The same kernels without bits and a map of tiles.
    without = peak(prefix_lens=torch.zeros(batch, device="cuda", dtype=torch.int32))
    of_map = 2 * batch * heads * (seqlen_q // 64 + 1) * (seqlen_k // 64 + 1)
    allowed = max(mask.untyped_storage().nbytes() // share, 1 << 20) + of_map
    assert peak(attn_mask=mask) - without <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_backward_needs_sums_of_dq_and_two_vectors(head_dim: int, deterministic: bool) -> None:
    seqlen, heads = 4096, 4
    rows = seqlen * heads
    q, k, v, dout = (
        torch.randn(1, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step()
    kept = sum(x.numel() * x.element_size() for x in gradients)
    turns = 4 * rows // 64 if deterministic else 0
    needed = 4 * rows * head_dim + 2 * 4 * rows + turns
    slack = 4 * 512  # the allocator rounds up
    assert torch.cuda.max_memory_allocated() - before <= kept + needed + slack
    assert torch.cuda.memory_allocated() - before <= kept
