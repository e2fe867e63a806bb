# SPDX-License-Identifier: BSD-3-Clause
"""float32 on CUDA: every element against float64, as TF32 where torch allows that and else as exact
as float32, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_attn_cuda import explain, flash_attn_func, lowlevel
from flash_attn_cuda.reference import attention_ref
from tests.kernels.test_rules import RULES, on_rules
from tests.support.cases import Case, make_inputs
from tests.support.compare import allowing_tf32, assert_bitwise_equal, check, run
from tests.support.suite import SUITE

pytestmark = pytest.mark.gpu

LARGEST_HEAD_DIM = 256


def _on_cuda(case: Case, tf32: bool) -> Case:
    bias_dtype = "float32" if case.bias_dtype == "float64" else case.bias_dtype
    return replace(case, dtype="float32", device="cuda", tf32=tf32, bias_dtype=bias_dtype)


def _cases(tf32: bool) -> list[Case]:
    fits = (c for c in SUITE if max(c.head_dim, c.width_of_values) <= LARGEST_HEAD_DIM)
    return list(dict.fromkeys(_on_cuda(case, tf32) for case in fits))


@pytest.mark.parametrize("case", _cases(tf32=False), ids=str)
def test_every_element_is_within_the_error_bound(case: Case) -> None:
    check(case, backward=True)


# Of large factors, the bound on their roundings says nothing.
@pytest.mark.parametrize("case", [c for c in _cases(tf32=True) if c.data != "large"], ids=str)
def test_every_element_is_within_the_error_bound_of_tf32(case: Case) -> None:
    check(case, backward=True)


WITH_BIAS = Case(seqlen_q=150, seqlen_k=150, heads=4, bias="bhqk", dlse=True, deterministic=True)


@on_rules
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("head_dim", [1, 30, 64, 128, 250, 256])
def test_rules(head_dim: int, tf32: bool, rules: dict[str, Any]) -> None:
    check(_on_cuda(replace(WITH_BIAS, head_dim=head_dim, **rules), tf32), backward=True)


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dims", ["bhqk", "hqk", "qk", "bk", "q", ""])
def test_biases(dims: str, bias_dtype: str) -> None:
    case = replace(WITH_BIAS, bias=dims, bias_dtype=bias_dtype, head_dim=64)
    check(_on_cuda(case, tf32=False), backward=True)


@pytest.mark.parametrize("lengths", ["", "qk"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences(head_dim: int, lengths: str) -> None:
    case = replace(WITH_BIAS, varlen=True, batch=5, head_dim=head_dim, lengths=lengths, causal=True)
    check(_on_cuda(case, tf32=False), backward=True)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_gradients_repeat_bit_for_bit(head_dim: int, tf32: bool) -> None:
    case = _on_cuda(replace(WITH_BIAS, seqlen_q=700, head_dim=head_dim, **RULES["mask"]), tf32)
    inputs = make_inputs(case)
    first, second = (run(case, inputs, backward=True) for _ in range(2))
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        assert_bitwise_equal(name, getattr(second, name), getattr(first, name))


def _error(tf32: bool) -> float:
    q, k, v = torch.randn(3, 1, 300, 2, 64, device="cuda").unbind()
    expected = attention_ref(q.double(), k.double(), v.double())[0]
    with allowing_tf32(tf32):
        out = flash_attn_func(q, k, v)
    return ((out.double() - expected).norm() / expected.norm()).item()


def test_products_lose_what_torch_allows_and_no_more() -> None:
    assert _error(tf32=False) < 2**-20
    assert 2**-14 < _error(tf32=True) < 2**-9


SETTINGS: dict[str, tuple[Callable[[], None], bool]] = {
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_torch_is_heard(name: str) -> None:
    q, k, v = torch.randn(3, 1, 64, 2, 64, device="cuda").unbind()
    allow, is_tf32 = SETTINGS[name]
    before = torch.get_float32_matmul_precision()
    try:
        allow()
        kernel = str(explain(q, k, v).forward.kernel)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ("_tf32_" in kernel) == is_tf32
    assert ("_float32_" in kernel) != is_tf32


def test_gradients_are_as_exact_as_their_forward() -> None:
    """Whatever torch allows by then."""
    case = Case(seqlen_q=100, seqlen_k=100, head_dim=64, dtype="float32", device="cuda")
    inputs = make_inputs(case)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with allowing_tf32(False):
        out, lse = flash_attn_func(*leaves, return_lse=True, deterministic=True)
        exact = lowlevel.backward(
            inputs.dout, *(x.detach() for x in (*leaves, out, lse)), deterministic=True
        )
    with allowing_tf32(True):
        gradients = torch.autograd.grad(out, leaves, inputs.dout)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_bitwise_equal(name, gradient, getattr(exact, name))


@pytest.mark.parametrize("tf32", [False, True])
def test_compiled(tf32: bool) -> None:
    q, k, v = torch.randn(3, 1, 100, 2, 64, device="cuda").unbind()
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: flash_attn_func(*qkv, causal=True), fullgraph=True)
    with allowing_tf32(tf32):
        expected = flash_attn_func(q, k, v, causal=True)
        assert_bitwise_equal("out", compiled(q, k, v), expected)
    with allowing_tf32(not tf32):
        expected = flash_attn_func(q, k, v, causal=True)
        assert_bitwise_equal("out, of the other precision", compiled(q, k, v), expected)


def test_autocast_casts() -> None:
    q, k, v = torch.randn(3, 1, 100, 2, 64, device="cuda").unbind()
    with torch.autocast("cuda", torch.bfloat16):
        out = flash_attn_func(q, k, v)
    assert out.dtype == torch.bfloat16
    assert_bitwise_equal("out", out, flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16()))
