# SPDX-License-Identifier: BSD-3-Clause
"""Gradients through PyTorch's machinery: numerically exact, partial, repeated, checkpointed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_cuda import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func


def _qkv(
    seqlen_q: int = 5, seqlen_k: int = 7, heads: int = 2, heads_kv: int = 2, head_dim: int = 2
) -> list[Tensor]:
    return [
        torch.randn(1, seqlen, n, head_dim, dtype=torch.float64, requires_grad=True)
        for seqlen, n in ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    ]


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (3, 7)])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window_size": (2, 1)}, {"window_size": (-1, 1)}], ids=str
)
def test_gradcheck_through_out_and_lse(
    mask: dict[str, object], seqlen_q: int, seqlen_k: int, heads_kv: int
) -> None:
    qkv = _qkv(seqlen_q, seqlen_k, heads=4, heads_kv=heads_kv)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return flash_attn_func(q, k, v, return_lse=True, softmax_scale=0.8, **mask)

    assert torch.autograd.gradcheck(attention, qkv)


def test_gradcheck_with_masked_rows() -> None:
    qkv = _qkv(seqlen_q=7, seqlen_k=4)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
        return out, lse[..., 3:]  # the first three rows see no key and have LSE -inf

    assert torch.autograd.gradcheck(attention, qkv)


def test_gradcheck_of_the_packed_forms() -> None:
    qkv = torch.randn(1, 5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flash_attn_qkvpacked_func(x, causal=True), (qkv,))
    q, kv = qkv[:, :, 0].detach().requires_grad_(), qkv[:, :, 1:].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True), (q, kv)
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...]) -> None:
    qkv = _qkv()
    full = torch.autograd.grad(flash_attn_func(*qkv).square().sum(), qkv)
    for index, tensor in enumerate(qkv):
        tensor.requires_grad_(index in wanted)
    flash_attn_func(*qkv).square().sum().backward()
    for index, tensor in enumerate(qkv):
        if index in wanted:
            assert torch.equal(tensor.grad, full[index])
        else:
            assert tensor.grad is None


def test_a_loss_of_the_lse_alone() -> None:
    q, k, v = _qkv()
    _, lse = flash_attn_func(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    expected = torch.autograd.grad(torch.logsumexp(scores, dim=-1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected, rtol=1e-12, atol=1e-14)
    assert (dv == 0).all()


def test_asking_for_the_lse_changes_no_gradient() -> None:
    qkv = _qkv()
    alone = torch.autograd.grad(flash_attn_func(*qkv).square().sum(), qkv)
    out, _ = flash_attn_func(*qkv, return_lse=True)
    beside_lse = torch.autograd.grad(out.square().sum(), qkv)
    for one, other in zip(alone, beside_lse, strict=True):
        assert torch.equal(one, other)


def test_no_graph_without_gradients() -> None:
    q, k, v = (x.detach() for x in _qkv())
    assert not flash_attn_func(q, k, v).requires_grad
    with torch.no_grad():
        assert not flash_attn_func(q.requires_grad_(), k, v).requires_grad
    with torch.inference_mode():
        assert flash_attn_func(q, k, v).is_inference()


def test_backward_twice_needs_retain_graph() -> None:
    qkv = _qkv()
    loss = flash_attn_func(*qkv).square().sum()
    first = torch.autograd.grad(loss, qkv, retain_graph=True)
    second = torch.autograd.grad(loss, qkv)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, qkv)


def test_an_input_changed_in_place_before_backward_is_noticed() -> None:
    q, k, v = _qkv()
    doubled = q * 1.0
    loss = flash_attn_func(doubled, k, v).sum()
    doubled.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_func_grad_equals_backward() -> None:
    q, k, v = _qkv()

    def loss(q: Tensor) -> Tensor:
        return flash_attn_func(q, k.detach(), v.detach(), causal=True).square().sum()

    expected = torch.autograd.grad(loss(q), q)[0]
    assert torch.equal(torch.func.grad(loss)(q.detach()), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    qkv = _qkv(seqlen_q=70, seqlen_k=70, head_dim=16)
    plain = torch.autograd.grad(flash_attn_func(*qkv, causal=True).square().sum(), qkv)
    out = checkpoint(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True), *qkv, use_reentrant=use_reentrant
    )
    out.square().sum().backward()
    for tensor, gradient in zip(qkv, plain, strict=True):
        assert torch.equal(tensor.grad, gradient)
