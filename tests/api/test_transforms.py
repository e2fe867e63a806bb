# SPDX-License-Identifier: BSD-3-Clause
"""torch.func.vmap of attention, alone and among other transforms, is a loop over its elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func, lowlevel
from flash_attn_cuda.reference import attention_ref
from tests.support.operators import CountOperators
from tests.support.random_calls import (
    DIFFERENTIABLE,
    PACKED,
    PADDED,
    Draw,
    RandomCall,
    assert_close,
)

SIZE = 3
QKV = ("q", "k", "v")


def _mapped(draw: Draw, call: RandomCall, names: list[str]) -> dict[str, tuple[Tensor, int]]:
    """For these arguments, SIZE different tensors stacked along any dimension, which is told."""
    heads, sizes = call.tensors["q"].shape[-2], [call.tensors[x].shape[-3] for x in ("q", "k")]
    mapped = {}
    for name in names:
        x = call.tensors[name]
        elements = [x]
        while len(elements) < SIZE:
            if x.is_floating_point():
                other = draw.normal(*x.shape, dtype=x.dtype)
            elif x.dtype == torch.bool:
                other = draw.mask(*x.shape)
            elif name.startswith("cu_seqlens"):
                lengths = x.diff().flip(0)
                other = torch.cat((x.new_tensor([draw.random.randrange(3)]), lengths)).cumsum(0)
                other = other.to(x.dtype)
            else:
                other = draw.tensor(name, *sizes, heads)
            elements.append(other)
        dim = draw.random.randrange(x.dim() + 1)
        mapped[name] = torch.stack(elements, dim), dim
    return mapped


def _elements(call: RandomCall, mapped: dict[str, tuple[Tensor, int]]) -> Iterator[RandomCall]:
    for index in range(SIZE):
        own = {name: x.select(dim, index) for name, (x, dim) in mapped.items()}
        yield RandomCall(call.tensors | own, call.options)


def _check_vmap(draw: Draw, call: RandomCall, names: list[str]) -> None:
    """Forward with and without gradients of autograd, and both orders of vmap and vjp."""
    mapped = _mapped(draw, call, names)
    tensors = call.tensors | {name: x for name, (x, _) in mapped.items()}
    wanted = call.differentiable
    in_dims = {name: mapped[name][1] if name in mapped else None for name in tensors}
    elements = list(_elements(call, mapped))
    with torch.no_grad():
        results = [x.flash() for x in elements]
    of_out = [draw.normal(SIZE, *x.shape, dtype=x.dtype) for x in results[0]]

    def forward(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return call.flash(**tensors)

    def gradients(tensors: dict[str, Tensor], *of_out: Tensor) -> tuple[Tensor, ...]:
        def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return forward(tensors | dict(zip(wanted, inputs, strict=True)))

        return vjp(function, *(tensors[name] for name in wanted))[1](tuple(of_out))

    expected, expected_gradients = [], []
    for index, element in enumerate(elements):
        leaves = [element.tensors[name].detach().requires_grad_() for name in wanted]
        own = element.reference(**dict(zip(wanted, leaves, strict=True)))
        expected.append([x.detach() for x in own])
        cotangents = [x[index].to(y.dtype) for x, y in zip(of_out, own, strict=True)]
        expected_gradients.append(torch.autograd.grad(own, leaves, cotangents))
    expected = [torch.stack(x) for x in zip(*expected, strict=True)]
    stacked = [torch.stack(x) for x in zip(*expected_gradients, strict=True)]

    for is_enabled in (False, True):
        with torch.set_grad_enabled(is_enabled):
            assert_close(list(vmap(forward, (in_dims,))(tensors)), expected)
    assert_close(list(vmap(gradients, (in_dims, 0, 0))(tensors, *of_out)), stacked)

    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    out = vmap(forward, (in_dims,))(tensors | leaves)
    got = torch.autograd.grad(out, list(leaves.values()), of_out)
    for name, one, each in zip(wanted, got, stacked, strict=True):
        dim = in_dims[name]
        assert_close(one, each.sum(0) if dim is None else each.movedim(0, dim))


@pytest.mark.parametrize(("packed", "seed"), [(p, s) for p in (False, True) for s in range(6)])
def test_vmap_is_a_loop(device: str, packed: bool, seed: int) -> None:
    draw = Draw(seed, device)
    call = draw.call(packed=packed)
    names = draw.some(call.tensors, 0.5) or ["q"]
    _check_vmap(draw, call, names)


EACH = [
    *((False, name) for name in (*QKV, *PADDED)),
    *((True, name) for name in (*QKV, "cu_seqlens_q", "cu_seqlens_k", *PACKED)),
]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("packed", "name"), EACH)
def test_each_argument_is_mapped_alone_and_alone_is_not(
    packed: bool, name: str, alone: bool
) -> None:
    draw = Draw(5, "cpu")
    call = draw.call([name] if name in PADDED + PACKED else [], packed=packed, sizes=(5, 7))
    _check_vmap(draw, call, [x for x in call.tensors if (x == name) == alone])


def _loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, attn_bias=bias, causal=True).sin().sum()


def _qkv(*batch: int, heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*batch, n, heads, 4, dtype=dtype) for n in (5, 7, 7)]


def test_per_sample_gradients_are_one_call_of_each_kernel() -> None:
    q, k, v = _qkv(SIZE, 2)
    bias = torch.randn(2, 1, 7, dtype=torch.float64)
    per_sample = grad(_loss, (0, 1, 2, 3))
    with CountOperators() as count:
        got = vmap(per_sample, (0, 0, None, None))(q, k, v[0], bias)
    assert count.calls == {"fwd_general": 1, "bwd_general": 1}
    expected = [per_sample(q[i], k[i], v[0], bias) for i in range(SIZE)]
    assert_close(list(got), [torch.stack(x) for x in zip(*expected, strict=True)])
    with CountOperators() as count:
        vmap(grad(lambda q: flash_attn_func(q, k[0], v[0]).sum()))(q)
        with torch.no_grad():
            vmap(flash_attn_func)(q, k, v)
    assert count.calls == {"fwd": 2, "bwd": 1}


def _gradient(call: RandomCall) -> Tensor:
    """Needs gradients of q, k, v alone."""
    q, k, v = (call.tensors[name] for name in QKV)

    def loss(*qkv: Tensor) -> Tensor:
        return call.flash(**dict(zip(QKV, qkv, strict=True)))[0].sum()

    return grad(loss, (0, 1, 2))(q, k, v)[0]


@pytest.mark.parametrize(
    ("packed", "names", "mapped", "calls"),
    [
        (False, PADDED, (*QKV, *(x for x in PADDED if x != "sinks")), 1),
        (False, PADDED, PADDED[:-1], 1),
        (False, ("sinks",), ("sinks",), SIZE),
        (True, (), QKV, SIZE),
        (True, (), ("cu_seqlens_q",), SIZE),
    ],
)
def test_what_folds_is_one_call(
    packed: bool, names: tuple[str, ...], mapped: tuple[str, ...], calls: int
) -> None:
    call = Draw(2, "cpu").call(names, packed=packed, sizes=(5, 7))
    stacked = {name: torch.stack([call.tensors[name]] * SIZE) for name in mapped}
    with CountOperators() as count:
        vmap(lambda own: _gradient(RandomCall(call.tensors | own, call.options)))(stacked)
    assert count.calls == {"fwd_general": calls, "bwd_general": calls}


def test_a_broadcast_bias_is_not_copied() -> None:
    """Its view of one batch serves all elements, as does a tensor that is not mapped."""
    q, k, v = (x[:, None] for x in _qkv(SIZE))
    bias, seen = torch.randn(1, 2, 5, 7, dtype=torch.float64), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.namespace == "flash_attn_cuda":
                seen.extend(x.data_ptr() for x in (args[0], args[1], args[7]))
            return function(*args, **(kwargs or {}))

    with Watch():
        vmap(lambda q, k: flash_attn_func(q, k, v[0], attn_bias=bias), (0, None))(q, k[0])
    assert seen == [x.data_ptr() for x in (q, k, bias)]


def test_nested() -> None:
    q, k, v = _qkv(2, SIZE, 1)
    got = vmap(vmap(flash_attn_func, (0, None, 0)), (0, 0, None))(q, k[:, 0], v[0])
    for i in range(2):
        for j in range(SIZE):
            assert_close(got[i, j], flash_attn_func(q[i, j], k[i, 0], v[0, j]))
    chunks = vmap(flash_attn_func, chunk_size=2)(q[0], k[0], v[0])
    assert_close(chunks, vmap(flash_attn_func)(q[0], k[0], v[0]))


@pytest.mark.parametrize(("packed", "names"), [(False, ()), (False, ("sinks",)), (True, ())])
def test_no_elements(packed: bool, names: tuple[str, ...]) -> None:
    call = Draw(0, "cpu").call(names, packed=packed, sizes=(5, 7))
    stacked = {name: x.expand(0, *x.shape) for name, x in call.tensors.items()}
    out, lse = vmap(lambda own: call.flash(**own))(stacked)
    expected = call.flash()
    assert [out.shape, lse.shape] == [(0, *x.shape) for x in expected]
    gradients = vmap(lambda own: _gradient(RandomCall(own, call.options)))(stacked)
    assert gradients.shape == (0, *call.tensors["q"].shape)


def test_jacrev_of_terms() -> None:
    """vmap over cotangents, where no argument is mapped but that of the results."""
    for packed in (False, True):
        draw = Draw(4, "cpu")
        call = draw.call(("attn_bias", "alibi_slopes", "sinks"), packed=packed, sizes=(2, 3))
        for name in call.differentiable:
            got, expected = (
                jacrev(lambda x, of=of, name=name: of(**{name: x})[0])(call.tensors[name])
                for of in (call.flash, call.reference)
            )
            assert_close(got, expected)


def test_the_largest_logit_of_each_element() -> None:
    q, k, v = _qkv(SIZE, 2)
    _, got = vmap(lambda *x: flash_attn_func(*x, return_max_logit=True))(q, k, v)
    expected = [flash_attn_func(*x, return_max_logit=True)[1] for x in zip(q, k, v, strict=True)]
    assert_close(got, torch.stack(expected))


def test_lowlevel() -> None:
    q, k, v = _qkv(SIZE, 2)
    out, lse = vmap(lowlevel.forward)(q, k, v)
    assert_close([out, lse], list(vmap(lambda *x: flash_attn_func(*x, return_lse=True))(q, k, v)))

    def backward(*inputs: Tensor) -> Tensor:
        return lowlevel.backward(*inputs).dk

    got = vmap(backward)(out, q, k, v, out, lse)
    each = [backward(*x) for x in zip(out, q, k, v, out, lse, strict=True)]
    assert_close(got, torch.stack(each))


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_obeys_randomness(device: str, packed: bool) -> None:
    draw = Draw(1, device)
    call = draw.call([], packed=packed, sizes=(66, 70))
    call.options["dropout_p"] = 0.5
    v = torch.stack([call.tensors["v"]] * SIZE)

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        out, pull = vjp(lambda v: call.flash(v=v)[0], v)
        return out, pull(torch.ones_like(out))[0]

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(both)(v)
    torch.manual_seed(3)
    out, dv = vmap(both, randomness="same")(v)
    torch.manual_seed(3)
    expected = both(v[0])
    for index in range(SIZE):
        assert_close([out[index], dv[index]], list(expected))
    out, dv = vmap(both, randomness="different")(v)
    assert not torch.equal(out[0], out[1])
    # out is linear in v, by the same decisions in both passes.
    parts, sums = (dv * v).double().flatten(1), out.double().flatten(1).sum(1)
    allowed = (1e-9 if v.dtype == torch.float64 else 0.02) * parts.abs().sum(1)
    assert ((parts.sum(1) - sums).abs() <= allowed).all()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_decides_by_state_and_place(randomness: str) -> None:
    q, k, v = _qkv(SIZE, 2)

    def decisions(q: Tensor) -> Tensor:
        return flash_attn_func(q, k[0], v[0], 0.5, return_attn_probs=True)[2] > 0

    kept = vmap(decisions, randomness=randomness)(q)
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")
    assert not torch.equal(kept[0, 0], kept[0, 1])


def test_errors_name_arguments() -> None:
    q, k, v = _qkv(SIZE, 2)
    with pytest.raises(ValueError, match="seqlens_k: "):
        vmap(lambda q: flash_attn_func(q, k[0], v[0], seqlens_k=torch.zeros(3).int()))(q)
    with pytest.raises(TypeError, match="attn_mask: "):
        vmap(lambda q, mask: flash_attn_func(q, k[0], v[0], attn_mask=mask))(q, torch.ones(SIZE, 7))


TRACED: dict[str, Callable[..., Any]] = {
    "vmap": vmap(lambda q, k, v: flash_attn_func(q, k, v, causal=True)),
    "grad": grad(lambda q, k, v: flash_attn_func(q, k, v, causal=True).sin().sum(), (0, 1)),
    "vmap of grad": vmap(grad(lambda *x: _loss(*x, x[1].sum((0, 2, 3))), (0, 1, 2))),
    "grad of vmap": grad(lambda *x: vmap(flash_attn_func)(*x).sin().sum()),
    "jvp": lambda q, k, v: jvp(lambda q: flash_attn_func(q, k, v), (q,), (q,)),
    "grad of grad": grad(
        lambda *x: grad(lambda *x: flash_attn_func(*x).sin().sum())(*x).square().sum()
    ),
    "sinks": vmap(lambda q, k, v: flash_attn_func(q, k, v, sinks=q.sum((0, 1, 3)))),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced(name: str) -> None:
    function = TRACED[name]
    qkv = _qkv(SIZE, 2) if "vmap" in name or name == "sinks" else _qkv(2)
    expected = function(*qkv)
    torch._dynamo.reset()
    assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(*qkv), expected)
    if name in ("jvp", "grad of grad"):  # of the second order
        with pytest.raises(NotImplementedError, match="make_fx"):
            make_fx(function)(*qkv)
    else:
        assert_close(make_fx(function)(*qkv)(*qkv), expected)


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("name", ["vmap", "sinks"])
def test_exported(name: str, is_strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, *qkv: Tensor) -> Any:
            return TRACED[name](*qkv)

    qkv = tuple(_qkv(SIZE, 2))
    program = torch.export.export(Module(), qkv, strict=is_strict)
    assert_close(program.module()(*qkv), TRACED[name](*qkv))


def test_export_of_forward_mode_is_refused() -> None:
    class Module(torch.nn.Module):
        def forward(self, *qkv: Tensor) -> Any:
            return TRACED["jvp"](*qkv)

    with pytest.raises(Exception, match=r"torch\.export of forward-mode AD"):
        torch.export.export(Module(), tuple(_qkv(2)), strict=False)


def test_vmap_of_an_exported_program() -> None:
    """The operators have the rules too."""

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return flash_attn_func(q, k, v), flash_attn_func(q, k, v, attn_mask=mask)

    inputs = [*_qkv(SIZE, 2), torch.rand(SIZE, 5, 7) < 0.7]
    module = torch.export.export(Module(), tuple(x[0] for x in inputs)).module()
    with CountOperators() as count:
        got = vmap(module)(*inputs)
    assert count.calls == {"fwd": 1, "fwd_general": 1}
    assert_close(list(got), list(vmap(Module())(*inputs)))


@pytest.mark.slow
def test_inductor() -> None:
    qkv = _qkv(SIZE, 2, dtype=torch.float32)
    function = TRACED["vmap of grad"]
    got = torch.compile(function, fullgraph=True)(*qkv)
    torch.testing.assert_close(got, function(*qkv))


def test_packed_sequences_of_each_element() -> None:
    x = torch.randn(SIZE, 9, 2, 4, dtype=torch.float64)
    first_rows = torch.tensor([[0, 4, 9], [0, 9, 9], [1, 2, 7]], dtype=torch.int32)

    def attention(x: Tensor, first_rows: Tensor) -> Tensor:
        return flash_attn_varlen_func(x, x, x, first_rows, first_rows, causal=True)

    def penalty(x: Tensor, first_rows: Tensor) -> Tensor:
        inner = grad(lambda x: attention(x, first_rows).sin().sum())
        return grad(lambda x: inner(x).square().sum())(x)

    for function in (attention, penalty):
        expected = [function(*each) for each in zip(x, first_rows, strict=True)]
        assert_close(vmap(function)(x, first_rows), torch.stack(expected))


SNIPPET = """
loss = lambda q, k, v: flash_attn_func(q, k, v, causal=True).square().sum()
per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(q[:, None], k[:, None], v[:, None])
curvature = torch.func.jvp(torch.func.grad(loss), (q, k, v), (q, k, v))[1]  # Hessian times vector
"""


def test_snippet() -> None:
    q, k, v = _qkv(SIZE)
    names: dict[str, Any] = {"q": q, "k": k, "v": v, "torch": torch}
    scope = {**names, "flash_attn_func": flash_attn_func}
    exec(SNIPPET, scope)
    reference = {**names, "flash_attn_func": lambda *x, **y: attention_ref(*x, **y)[0]}
    exec(SNIPPET, reference)
    for name in ("per_sample", "curvature"):
        assert_close(scope[name], reference[name])


def test_every_differentiable_argument_is_known() -> None:
    """Those that the tests above differentiate in are all floating-point tensors that there are."""
    call = Draw(0, "cpu").call(PADDED, sizes=(5, 5))
    floating = [name for name, x in call.tensors.items() if x.is_floating_point()]
    assert sorted(floating) == sorted(DIFFERENTIABLE)
