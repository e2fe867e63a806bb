# SPDX-License-Identifier: BSD-3-Clause
"""Double backward and forward-mode AD: those of the reference, in memory linear in seqlen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

from flash_attn_cuda import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn_cuda.reference import attention_ref
from tests.support.random_calls import (
    DIFFERENTIABLE,
    PACKED,
    PADDED,
    Draw,
    RandomCall,
    assert_close,
)

Function = Callable[..., tuple[Tensor, ...]]
KINDS = [(packed, seed) for packed in (False, True) for seed in range(6)]


def _function(call: RandomCall, of: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    """Of the tensors that it is differentiable in."""
    return lambda *inputs: of(**dict(zip(call.differentiable, inputs, strict=True)))


def _inputs(call: RandomCall) -> list[Tensor]:
    return [call.tensors[name].detach().clone() for name in call.differentiable]


def _cotangents(draw: Draw, function: Function, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [draw.normal(*x.shape, dtype=x.dtype) for x in function(*inputs)]


def _second(
    function: Function, inputs: list[Tensor], of_out: list[Tensor], of_gradients: list[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of inputs and of out's and lse's gradients, by double backward."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    of_out = [x.detach().requires_grad_() for x in of_out]
    results = function(*inputs)
    of_out = [x.to(y.dtype) for x, y in zip(of_out, results, strict=True)]
    gradients = torch.autograd.grad(results, inputs, of_out, create_graph=True)
    return torch.autograd.grad(gradients, [*inputs, *of_out], of_gradients)


@pytest.mark.parametrize(("packed", "seed"), KINDS)
def test_double_backward(device: str, packed: bool, seed: int) -> None:
    draw = Draw(seed, device)
    call = draw.call(packed=packed)
    flash, reference = _function(call, call.flash), _function(call, call.reference)
    inputs = _inputs(call)
    of_out = _cotangents(draw, flash, inputs)
    of_gradients = [draw.normal(*x.shape, dtype=x.dtype) for x in inputs]
    got = _second(flash, inputs, of_out, of_gradients)
    assert_close(got, _second(reference, inputs, of_out, of_gradients))


@pytest.mark.parametrize(("packed", "seed"), KINDS)
def test_forward_mode(device: str, packed: bool, seed: int) -> None:
    draw = Draw(seed, device)
    call = draw.call(packed=packed)
    flash, reference = _function(call, call.flash), _function(call, call.reference)
    inputs = tuple(_inputs(call))
    tangents = tuple(draw.normal(*x.shape, dtype=x.dtype) for x in inputs)
    expected = jvp(reference, inputs, tangents)
    assert_close(jvp(flash, inputs, tangents), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*x) for x in zip(inputs, tangents, strict=True)]
        for is_enabled in (False, True):
            with torch.set_grad_enabled(is_enabled):
                results = [forward_ad.unpack_dual(x) for x in flash(*duals)]
            assert_close([x.primal for x in results], expected[0])
            assert_close([x.tangent for x in results], expected[1])


@pytest.mark.parametrize("is_enabled", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_dual_tensors_without_terms(return_lse: bool, is_enabled: bool) -> None:
    """Also through the backward pass, where one is asked for."""
    q, k, v = _random((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2))

    def results(of: Callable[..., Any], q: Tensor) -> list[Tensor]:
        out = of(q, k, v)
        out = [out] if isinstance(out, Tensor) else list(out)[: 1 + return_lse]
        if is_enabled:
            out += torch.autograd.grad([x.sin().sum() for x in out], q, create_graph=True)
        return out

    got, expected = [], []
    for into, of in ((got, flash_attn_func), (expected, attention_ref)):
        options = {"return_lse": return_lse} if of is flash_attn_func else {}
        with forward_ad.dual_level(), torch.set_grad_enabled(is_enabled):
            dual = forward_ad.make_dual(q.clone().requires_grad_(is_enabled), k[:, :3])
            for x in results(partial(of, **options), dual):
                into += [y.detach() for y in forward_ad.unpack_dual(x)]
    assert_close(got, expected)


RULES = tuple(name for name in PADDED if name not in DIFFERENTIABLE)


@pytest.mark.parametrize(
    ("packed", "names"),
    [
        *((False, names) for names in ((), ("attn_bias",), ("alibi_slopes",), ("sinks",), RULES)),
        (True, PACKED),
    ],
    ids=str,
)
def test_gradgradcheck(packed: bool, names: tuple[str, ...]) -> None:
    call = Draw(3, "cpu").call(names, packed=packed, sizes=(4, 5))
    call.options["softcap"] = 2.0
    inputs = tuple(x.requires_grad_() for x in _inputs(call))
    finite = call.reference()[1] != -torch.inf

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _function(call, call.flash)(*inputs)
        return out, lse[finite]

    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _losses() -> Iterator[Callable[..., Tensor]]:
    yield lambda *qkv: flash_attn_func(*qkv, causal=True).sin().sum()
    yield lambda *qkv: attention_ref(*qkv, causal=True)[0].sin().sum()


ALL = (0, 1, 2)


def _penalised(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *qkv: loss(*qkv) + sum(x.square().sum() for x in grad(loss, ALL)(*qkv))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "gradient of a gradient penalty": lambda loss: grad(_penalised(loss), ALL),
    "third derivative": lambda loss: grad(_penalised(_penalised(loss)), ALL),
    "hessian": lambda loss: hessian(loss, ALL),
    "jacrev of jacrev": lambda loss: jacrev(jacrev(loss, ALL), ALL),
    "jacfwd of jacfwd": lambda loss: jacfwd(jacfwd(loss, 1), ALL),
    "jacrev of jacfwd": lambda loss: jacrev(jacfwd(loss, 1), ALL),
    "product with the hessian": lambda loss: lambda *qkv: jvp(grad(loss, ALL), qkv, qkv)[1],
    "vjp of jvp": lambda loss: (
        lambda *qkv: vjp(lambda *x: jvp(loss, x, qkv)[1], *qkv)[1](
            torch.ones((), dtype=qkv[0].dtype)
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_transforms(name: str) -> None:
    qkv = _random((1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2))
    got, expected = (TRANSFORMS[name](loss)(*qkv) for loss in _losses())
    assert_close(got, expected)


def test_an_outer_derivative_in_what_the_inner_one_ignores() -> None:
    """Inner transforms do not know that the bias, the slopes and the sinks are differentiated."""
    q, k, v, *terms = _random((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2), (3, 4), (2,), (2,))
    names = ("attn_bias", "alibi_slopes", "sinks")

    def mixed(of: Callable[..., Any], inner: Callable[..., Any]) -> Any:
        def loss(q: Tensor, *terms: Tensor) -> Tensor:
            results = of(q, k, v, **dict(zip(names, terms, strict=True)))
            return (results[0] if isinstance(results, tuple) else results).sin().sum()

        def once(*terms: Tensor) -> Tensor:
            return inner(lambda q: inner(lambda q: loss(q, *terms), q), q)

        return grad(once, ALL)(*terms)

    def by_grad(function: Callable[..., Tensor], q: Tensor) -> Tensor:
        return grad(function)(q).square().sum()

    def by_jvp(function: Callable[..., Tensor], q: Tensor) -> Tensor:
        return jvp(function, (q,), (q.cos(),))[1]

    for inner in (by_grad, by_jvp):
        assert_close(mixed(flash_attn_func, inner), mixed(attention_ref, inner))


def test_the_hessian_by_autograd() -> None:
    qkv = tuple(_random((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2)))
    got, expected = (torch.autograd.functional.hessian(loss, qkv) for loss in _losses())
    assert_close(got, expected)
    (got, expected) = (
        torch.autograd.functional.hvp(loss, qkv, qkv, strict=True)[1] for loss in _losses()
    )
    assert_close(got, expected)


def test_packed_forms() -> None:
    qkv = torch.randn(1, 5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: flash_attn_qkvpacked_func(x, causal=True), qkv, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Dtypes are those of what is differentiated, also under autocast, and sums are float32."""
    inputs = [
        x.to(dtype) for x in _random((2, 200, 2, 8), (2, 190, 1, 8), (2, 190, 1, 8), (200, 190))
    ]

    def gradients(of: Callable[..., Any], cast: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        out = of(*leaves[:3], attn_bias=leaves[3], causal=True)
        out = out[0] if isinstance(out, tuple) else out
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    expected = gradients(attention_ref, torch.float64)
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        got = gradients(flash_attn_func, dtype)
    roundoffs = (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < roundoffs * other.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_refused(packed: bool) -> None:
    call = Draw(0, "cpu").call([], packed=packed, sizes=(4, 5))
    call.options["dropout_p"] = 0.5
    q = call.tensors["q"].requires_grad_()
    (dq,) = torch.autograd.grad(call.flash()[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"dropout_p: .*got 0\.5"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="dropout_p: "):
        jvp(lambda q: call.flash(q=q)[0], (q.detach(),), (q.detach(),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="dropout_p: "):
        call.flash(q=forward_ad.make_dual(q.detach(), q.detach()))


def test_nothing_is_lost_without_grad_mode() -> None:
    """Forward-mode AD goes on where torch.no_grad() ends reverse mode, in both passes."""
    q, k, v, dout = _random((1, 3, 2, 2), (1, 4, 2, 2), (1, 4, 2, 2), (1, 3, 2, 2))

    def gradient(of: Callable[..., Any], q: Tensor) -> Tensor:
        _, pull = vjp(lambda q: of(q, k, v), q)
        with torch.no_grad():
            return pull(dout)[0]

    got, expected = (
        jvp(lambda q, of=of: gradient(of, q), (q,), (k[:, :3],))
        for of in (flash_attn_func, lambda *x: attention_ref(*x)[0])
    )
    assert_close(got, expected)


def test_linearize_is_refused() -> None:
    """Of derivatives beyond the first, whose results it would take for zeros."""
    q, k, v = torch.randn(3, 2, 70, 2, 16)
    gradient = torch.func.grad(lambda q: flash_attn_func(q, k, v, causal=True).square().sum())
    with pytest.raises(NotImplementedError, match=r"linearize .* use torch\.func\.jvp"):
        torch.func.linearize(gradient, q)


MEASURE_RSS = """
import resource
import torch
from torch.func import jvp
from flash_attn_cuda import flash_attn_func

def step(seqlen, kind):
    q, k, v = (torch.randn(1, seqlen, 1, 16, requires_grad=True) for _ in range(3))
    if kind == "jvp":
        jvp(lambda q: flash_attn_func(q, k, v, causal=True), (q,), (q,))
    elif kind == "penalty":
        loss = flash_attn_func(q, k, v, causal=True).square().sum()
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        dq.square().sum().backward()
    else:
        def loss(q):
            return flash_attn_func(q, k, v, causal=True).square().sum()
        torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q.detach())

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for seqlen in (128, 2048, 4096):
    for kind in ("jvp", "penalty", "func"):
        step(seqlen, kind)
    print(peak())
"""


def test_memory_is_linear_in_seqlen() -> None:
    pytest.importorskip("resource", reason="the peak of a process is read with it")
    # By a shell between: a process begins with the peak of the one that made it.
    shell = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, MEASURE_RSS]
    printed = subprocess.run(shell, check=True, capture_output=True, text=True).stdout
    start, once, twice = map(int, printed.split())
    assert twice - start < 3 * max(once - start, 8 << 20)
    assert twice - start < 4 * 4096 * 4096  # less than all scores in float32


@pytest.mark.gpu
def test_cuda_memory_is_linear_in_seqlen() -> None:
    peaks = []
    for seqlen in (512, 8192, 16384):
        x = torch.randn(1, seqlen, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = flash_attn_func(x, x, x, causal=True).float().square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.float().square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 2.5 * peaks[1]
    assert peaks[2] < 16384 * 16384


def test_no_waiting_but_for_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked a tensor for its values")

    call = Draw(1, "cpu").call(["seqlens_k", "attn_mask", "sinks"], sizes=(5, 7))
    packed = Draw(1, "cpu").call([], packed=True, sizes=(5, 7))
    gradients = []
    for one in (call, packed):
        q = one.tensors["q"].requires_grad_()
        gradients += torch.autograd.grad(one.flash()[0].sin().sum(), q, create_graph=True)
    for name in ("item", "tolist", "__int__", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, refuse)
    gradients[0].sum().backward()
    with pytest.raises(AssertionError, match="asked a tensor"):
        gradients[1].sum().backward()


def test_empty() -> None:
    for seqlen_q, seqlen_k in ((0, 3), (3, 0), (0, 0)):
        q = torch.randn(2, seqlen_q, 2, 4, dtype=torch.float64, requires_grad=True)
        k = torch.randn(2, seqlen_k, 2, 4, dtype=torch.float64, requires_grad=True)
        (dk,) = torch.autograd.grad(flash_attn_func(q, k, k).sin().sum(), k, create_graph=True)
        dq, dk = torch.autograd.grad((dk * dk).sum(), (q, k))
        assert dq.shape == q.shape
        assert (dq == 0).all()
        assert (dk == 0).all()
    rows = torch.zeros(1, dtype=torch.int32)
    q = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = flash_attn_varlen_func(q, q, q, rows, rows)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert (torch.autograd.grad(dq.sum(), q)[0] == 0).all()
