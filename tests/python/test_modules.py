# SPDX-License-Identifier: BSD-3-Clause
"""The modules against torch's own attention with the same weights, forward and backward, in every
option; packed against padded sequences; and what a training loop does with a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.modules import (
    MHA,
    FlashCrossAttention,
    FlashSelfAttention,
    get_alibi_slopes,
)
from flash_attn_cuda.reference import attention_ref
from tests.support.operators import CountOperators
from tests.support.plain_mha import plain_mha, weights_of

WIDTH = 48  # 6 heads of 8 channels: no power of two
# Largest error beside the largest element.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3e-2}
ROTARY_TOLERANCE = 1e-5  # of tables in float32

arithmetic = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float64),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)


def _hidden(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64).to(device, dtype)


def _mha(*arguments: Any, device: str = "cpu", dtype: torch.dtype, **options: Any) -> MHA:
    """With weights under which attention is far from uniform."""
    mha = MHA(WIDTH, *arguments, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / WIDTH**0.4)
    return mha


def _assert_close(got: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    error = (got.detach().cpu().double() - expected.detach()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


def _compare(
    mha: MHA,
    x: Tensor,
    x_kv: Tensor | None,
    forward: dict[str, Any],
    expected: dict[str, Any],
    tolerance: float,
) -> None:
    """Output, and gradients of inputs and weights."""
    inputs = [t.requires_grad_() for t in (x, x_kv) if t is not None]
    exact_inputs = [t.detach().cpu().double().requires_grad_() for t in inputs]
    weights = weights_of(mha)
    out = mha(*inputs, **forward)
    exact = plain_mha(mha, weights, *exact_inputs, **expected)
    _assert_close(out, exact, tolerance)
    dout = torch.randn(exact.shape, dtype=torch.float64).to(out.dtype)
    out.backward(dout.to(out.device))
    exact.backward(dout.double())
    for t, exact_t in zip(inputs, exact_inputs, strict=True):
        _assert_close(t.grad, exact_t.grad, tolerance)
    for name, parameter in mha.named_parameters():
        _assert_close(parameter.grad, weights[name].grad, tolerance)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"window": (-1, 0)}),
    "window": ({"window_size": (3, 2)}, {"window": (3, 2)}),
    "scale": ({"softmax_scale": 0.7}, {"softmax_scale": 0.7}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "alibi": ({"use_alibi": True, "causal": True}, {"alibi": True, "window": (-1, 0)}),
    "grouped": ({"num_heads_kv": 3}, {}),
    "one key head": ({"num_heads_kv": 1, "causal": True}, {"window": (-1, 0)}),
    "no biases": ({"qkv_proj_bias": False, "out_proj_bias": False}, {}),
    "checkpointed": ({"checkpointing": True, "num_heads_kv": 2}, {}),
    "checkpointed qkv": ({"checkpointing": True}, {}),
    "without use_flash_attn": ({"use_flash_attn": False}, {}),
}
ROTARY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole heads": ({"rotary_emb_dim": 8}, {"rotary": {}}),
    "a part": ({"rotary_emb_dim": 4, "num_heads_kv": 2}, {"rotary": {}}),
    "interleaved": (
        {"rotary_emb_dim": 8, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
        {"rotary": {"interleaved": True, "base": 100.0}},
    ),
    "xPos": (
        {"rotary_emb_dim": 8, "rotary_emb_scale_base": 32.0},
        {"rotary": {"scale_base": 32.0}},
    ),
}


@arithmetic
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cross_attn", [False, True])
def test_every_option(name: str, cross_attn: bool, device: str, dtype: torch.dtype) -> None:
    options, expected = OPTIONS[name]
    mha = _mha(6, cross_attn=cross_attn, device=device, dtype=dtype, **options)
    x = _hidden(2, 17, dtype=dtype, device=device)
    x_kv = _hidden(2, 23, dtype=dtype, device=device) if cross_attn else None
    _compare(mha, x, x_kv, {}, expected, TOLERANCE[dtype])


@arithmetic
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions(name: str, device: str, dtype: torch.dtype) -> None:
    options, expected = ROTARY[name]
    mha = _mha(6, device=device, dtype=dtype, **options)
    tolerance = max(TOLERANCE[dtype], ROTARY_TOLERANCE)
    x = _hidden(2, 17, dtype=dtype, device=device)
    _compare(mha, x, None, {}, expected, tolerance)


def test_hooked_projections() -> None:
    """A full backward hook makes results that nobody may write into."""
    mha = _mha(6, rotary_emb_dim=8, dtype=torch.float32)
    x = _hidden(2, 17, dtype=torch.float32, device="cpu").requires_grad_()
    (expected,) = torch.autograd.grad(mha(x).square().sum(), x)
    gradients = []
    mha.Wqkv.register_full_backward_hook(lambda module, dx, dy: gradients.append((*dx, *dy)))
    mha(x).square().sum().backward()
    _assert_close(x.grad, expected.double(), 5e-6)
    assert [tuple(t.shape) for t in gradients[0]] == [(2, 17, 48), (2, 17, 144)]


@arithmetic
@pytest.mark.parametrize("cross_attn", [False, True])
@pytest.mark.parametrize("num_heads_kv", [6, 2])
def test_padding(cross_attn: bool, num_heads_kv: int, device: str, dtype: torch.dtype) -> None:
    mha = _mha(6, num_heads_kv, cross_attn, device=device, dtype=dtype)
    x = _hidden(3, 17, dtype=dtype, device=device)
    x_kv = _hidden(3, 23, dtype=dtype, device=device) if cross_attn else None
    key = torch.arange(23 if cross_attn else 17)
    seen = torch.stack([key < 9, key >= 5, key % 3 == 1])
    forward = {"key_padding_mask": seen.to(device)}
    _compare(mha, x, x_kv, forward, {"seen": seen}, TOLERANCE[dtype])


@arithmetic
def test_a_subset_of_queries(device: str, dtype: torch.dtype) -> None:
    mha = _mha(6, cross_attn=True, device=device, dtype=dtype)
    x = _hidden(2, 17, dtype=dtype, device=device)
    whole = mha(x)
    for subset in (slice(0, 1), torch.tensor([3, 11], device=device)):
        _assert_close(mha(x, mixer_subset=subset), whole[:, subset].cpu(), TOLERANCE[dtype])


def test_other_arguments_reach_attention() -> None:
    mha = _mha(6, dtype=torch.float64)
    x = _hidden(2, 17, dtype=torch.float64, device="cpu")
    causal = plain_mha(mha, weights_of(mha), x, window=(-1, 0))
    _assert_close(mha(x, causal=True), causal, 1e-13)
    hidden = torch.ones(17, 17, dtype=torch.bool).tril()
    _assert_close(mha(x, attn_mask=hidden), causal, 1e-13)
    with pytest.raises(TypeError, match="attn_maks"):
        mha(x, attn_maks=hidden)


def test_the_residual_comes_back() -> None:
    mha = _mha(6, return_residual=True, dtype=torch.float32)
    x = _hidden(2, 5, dtype=torch.float32, device="cpu")
    out, residual = mha(x)
    assert residual is x
    mha.return_residual = False
    assert torch.equal(mha(x), out)


def _pack(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([x[i, :n] for i, n in enumerate(lengths)])


def _first_rows(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@arithmetic
@pytest.mark.parametrize("num_heads_kv", [6, 2])
@pytest.mark.parametrize("max_seqlen", [None, 17, torch.tensor(17)], ids=str)
@pytest.mark.parametrize("scale_base", [None, 64.0])
def test_packed_sequences_are_padded_ones(
    num_heads_kv: int,
    max_seqlen: int | Tensor | None,
    scale_base: float | None,
    device: str,
    dtype: torch.dtype,
) -> None:
    mha = _mha(
        *(6, num_heads_kv),
        causal=True,
        rotary_emb_dim=6,
        rotary_emb_scale_base=scale_base,
        device=device,
        dtype=dtype,
    )
    lengths = [17, 0, 4, 9]
    x = _hidden(4, 17, dtype=dtype, device=device).requires_grad_()
    packed = _pack(x, lengths).detach().requires_grad_()
    out = mha(packed, cu_seqlens=_first_rows(lengths, device), max_seqlen=max_seqlen)
    expected = _pack(mha(x), lengths)
    tolerance = max(TOLERANCE[dtype], ROTARY_TOLERANCE)
    _assert_close(out, expected.cpu(), tolerance)
    dout = torch.randn_like(expected)
    gradients = []
    for result, leaf in ((out, packed), (expected, x)):
        gradients.append(torch.autograd.grad(result, [leaf, *mha.parameters()], dout))
    (dx, *of_weights), (expected_dx, *expected_of_weights) = gradients
    _assert_close(dx, _pack(expected_dx, lengths).cpu(), tolerance)
    scale = max(float(g.abs().max()) for g in expected_of_weights)
    for got, want in zip(of_weights, expected_of_weights, strict=True):
        assert (got - want).abs().max().item() <= tolerance * scale


@arithmetic
def test_packed_cross_attention(device: str, dtype: torch.dtype) -> None:
    mha = _mha(6, 2, cross_attn=True, device=device, dtype=dtype)
    lengths, lengths_k = [5, 9], [11, 3]
    x, x_kv = (_hidden(2, 11, dtype=dtype, device=device) for _ in range(2))
    rows, rows_k = _first_rows(lengths, device), _first_rows(lengths_k, device)
    packed, packed_kv = _pack(x, lengths), _pack(x_kv, lengths_k)
    out = mha(packed, packed_kv, cu_seqlens=rows, cu_seqlens_k=rows_k)
    alone = [
        mha(x[i : i + 1, :n], x_kv[i : i + 1, :m]) for i, (n, m) in enumerate(((5, 11), (9, 3)))
    ]
    _assert_close(out, torch.cat(alone, dim=1)[0].cpu(), TOLERANCE[dtype])
    of_itself = mha(packed, cu_seqlens=rows)
    alone = [mha(x[i : i + 1, :n]) for i, n in enumerate(lengths)]
    _assert_close(of_itself, torch.cat(alone, dim=1)[0].cpu(), TOLERANCE[dtype])


@pytest.mark.parametrize("attention", [FlashSelfAttention, FlashCrossAttention])
@pytest.mark.parametrize("packed", [False, True])
def test_inner_attention_is_the_function(
    attention: type[FlashSelfAttention | FlashCrossAttention], packed: bool, device: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(2, 12, 4, 16, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, 12, 4, 16, device=device, dtype=dtype)
    slopes, sinks = torch.rand(2, 4, device=device)
    settings = {
        "softmax_scale": 0.3,
        "window_size": (7, 3),
        "alibi_slopes": slopes,
        "deterministic": True,
        "softcap": 3.0,
        "sinks": sinks,
    }
    module = attention(True, attention_dropout=0.4, **settings)
    function, cu_seqlens, dim = flash_attn_func, [], 2
    if packed:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        rows = _first_rows([5, 19], device)
        function, cu_seqlens, dim = flash_attn_varlen_func, [rows, rows], 1
    inputs = [q, torch.stack([k, v], dim)]
    options = {"cu_seqlens": cu_seqlens[0]} if packed else {}
    if attention is FlashSelfAttention:
        inputs = [torch.stack([q, k, v], dim)]
    elif packed:
        options |= {"cu_seqlens_k": cu_seqlens[0]}
    bias = torch.randn(20, 20, device=device)[: 20 if packed else 12, : 20 if packed else 12]
    for training, causal in ((True, None), (False, None), (True, False)):
        module.train(training)
        torch.manual_seed(1)
        out = module(*inputs, causal, attn_bias=bias, **options)
        torch.manual_seed(1)
        expected = function(
            *(q, k, v, *cu_seqlens),
            dropout_p=0.4 if training else 0.0,
            causal=causal is None,
            attn_bias=bias,
            **settings,
        )
        assert torch.equal(out, expected)


def test_learned_slopes_and_sinks() -> None:
    slopes, sinks = (torch.nn.Parameter(torch.rand(4)) for _ in range(2))
    attention = FlashSelfAttention(alibi_slopes=slopes, sinks=sinks)
    assert dict(attention.named_parameters()) == {"alibi_slopes": slopes, "sinks": sinks}
    qkv = torch.randn(2, 12, 3, 4, 16, dtype=torch.float32)
    out = attention(qkv)
    exact, _ = attention_ref(*qkv.double().unbind(2), alibi_slopes=slopes, sinks=sinks)
    _assert_close(out, exact, 1e-5)
    gradients = torch.autograd.grad(out.square().sum(), (slopes, sinks))
    expected = torch.autograd.grad(exact.square().sum(), (slopes, sinks))
    for got, want in zip(gradients, expected, strict=True):
        _assert_close(got, want, 1e-4)


def test_dropout_is_of_training_alone(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    mha = _mha(6, dropout=0.5, device=device, dtype=dtype)
    certain = _mha(6, device=device, dtype=dtype)
    certain.load_state_dict(mha.state_dict())
    x = _hidden(2, 17, dtype=dtype, device=device)
    assert not torch.equal(mha(x), mha(x))
    assert torch.equal(mha.eval()(x), certain(x))


def test_checkpointing_drops_the_same_and_keeps_inputs_alone(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    mha = _mha(6, dropout=0.5, device=device, dtype=dtype)
    mha.inner_attn.deterministic = True
    x = _hidden(2, 17, dtype=dtype, device=device).requires_grad_()
    results, saved = [], []
    for mha.checkpointing in (False, True):
        torch.manual_seed(3)
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            out = mha(x)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), [x, *mha.parameters()])))
        saved.append((2, 6, 17) in shapes)  # softmax_lse
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert saved == [True, False]


@pytest.mark.parametrize("name", OPTIONS)
def test_our_kernels_run(name: str) -> None:
    options, _ = OPTIONS[name]
    mha = _mha(6, dtype=torch.float32, **options)
    x = _hidden(2, 17, dtype=torch.float32, device="cpu").requires_grad_()
    with CountOperators() as operators:
        mha(x).sum().backward()
    assert operators.forward == (2 if mha.checkpointing else 1)
    assert operators.backward == 1
    assert not [n for n in operators.names if "softmax" in n or "scaled_dot" in n or "bmm" in n]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype, device: str) -> None:
    mha = _mha(
        12, 4, causal=True, rotary_emb_dim=4, use_alibi=True, device=device, dtype=torch.float32
    )
    x = _hidden(2, 17, dtype=torch.float32, device=device)
    expected = plain_mha(
        mha, weights_of(mha), x.cpu().double(), rotary={}, alibi=True, window=(-1, 0)
    )
    with torch.autocast(device, dtype):
        out = mha(x)
    assert out.dtype == dtype
    _assert_close(out, expected, 4e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mha.parameters())
    mha.to(dtype)
    out = mha(x.to(dtype))
    assert out.dtype == dtype
    _assert_close(out, expected, 4e-2)
    slopes = torch.tensor(get_alibi_slopes(12), device=device)
    assert torch.equal(mha.inner_attn.alibi_slopes, slopes)


def test_empty_batch() -> None:
    mha = _mha(6, 2, rotary_emb_dim=8, dtype=torch.float32)
    assert mha(torch.randn(0, 5, WIDTH)).shape == (0, 5, WIDTH)
    assert mha(torch.randn(2, 0, WIDTH)).shape == (2, 0, WIDTH)
    packed = mha(torch.randn(0, WIDTH), cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert packed.shape == (0, WIDTH)


def _training_step(mha: Any, x: Tensor, **forward: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    out = mha(x, **forward)
    return out.detach(), *torch.autograd.grad(out.square().mean(), [x, *mha.parameters()])


GROUPED = {"num_heads_kv": 2, "rotary_emb_dim": 8, "dropout": 0.3}
CHECKPOINTED = {
    "checkpointing": True,
    "use_alibi": True,
    "rotary_emb_dim": 8,
    "rotary_emb_scale_base": 16.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "packed"), [(GROUPED, False), (GROUPED, True), (CHECKPOINTED, False)]
)
def test_one_graph_serves_training_at_all_lengths(
    options: dict[str, Any], packed: bool, device: str
) -> None:
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    mha = _mha(6, causal=True, device=device, dtype=dtype, **options)
    compiled = torch.compile(mha, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (12, 7):
        x = _hidden(2, seqlen, dtype=dtype, device=device)
        forward = {}
        if packed:
            rows = _first_rows([seqlen + 3, seqlen - 3], device)
            x, forward = x.flatten(0, 1), {"cu_seqlens": rows}
        x.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = _training_step(compiled, x, **forward)
        expected = _training_step(mha, x, **forward)
        tolerance = max(TOLERANCE[dtype], ROTARY_TOLERANCE)
        for t, exact in zip(got, expected, strict=True):
            assert (t - exact).abs().max() <= tolerance * exact.abs().max()
