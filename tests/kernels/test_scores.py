# SPDX-License-Identifier: BSD-3-Clause
"""Softcap, ALiBi, sinks and dropout: results within the error bound, each alone and all together,
and what they promise beyond that. All families run the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func, lowlevel
from flash_attn_cuda.reference import attention_ref, attention_scores, keep_probability
from tests.support.cases import Case, make_inputs
from tests.support.compare import assert_bitwise_equal, check, kept_of, run
from tests.support.families import ALL_FAMILIES, CUDA_FAMILIES, device_of, only

CPU_HEAD_DIM = 40
CUDA_HEAD_DIMS = (64, 96, 128, 192, 256, 512)
on_head_dims = pytest.mark.parametrize(
    ("device", "head_dim"),
    [
        ("cpu", CPU_HEAD_DIM),
        *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in CUDA_HEAD_DIMS),
    ],
)
TERMS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0},
    "loose softcap": {"softcap": 50.0},
    "alibi of heads": {"alibi": "h"},
    "alibi of all": {"alibi": "bh"},
    "sinks": {"sinks": "normal"},
    "large sinks": {"sinks": "large"},
    "some sinks": {"sinks": "holes"},
    "dropout": {"dropout": 0.17},
    "most dropped": {"dropout": 0.9},
    "all dropped": {"dropout": 1.0},
    "largest score": {"max_logit": True},
    "all": {"softcap": 5.0, "alibi": "bh", "sinks": "normal", "dropout": 0.3, "max_logit": True},
}
ALL = TERMS["all"]
# What they meet in turn.
BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True, "heads_kv": 2},
    "window": {"window": (37, 5), "seqlen_q": 201},
    "masks": {"mask": "bhqk", "padding": "left", "block_mask": "qk", "bias": "bhqk"},
    "packed": {"varlen": True, "batch": 4, "causal": True, "lengths": "qk", "heads_kv": 1},
    "lengths": {"lengths": "qk", "window": (-1, 3), "bias": "hk"},
    "documents": {"documents": "runs", "prefix": True, "causal": True, "head_dim_v": 24},
}


def _case(device: str, head_dim: int, **fields: Any) -> Case:
    plain = {"seqlen_q": 150, "seqlen_k": 150, "heads": 4, "heads_kv": 4, "dlse": True}
    return Case(**{**plain, **fields}, head_dim=head_dim).on(device)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Problems are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def _family(name: str) -> Iterator[str]:
    """A device where this family runs, and no other of CUDA."""
    device = device_of(name)
    with only("" if name == "cpu" else name):
        yield device


@pytest.mark.parametrize("beside", BESIDE.values(), ids=list(BESIDE))
@pytest.mark.parametrize("terms", TERMS.values(), ids=list(TERMS))
@on_head_dims
def test_every_element_is_within_the_error_bound(
    device: str, head_dim: int, terms: dict[str, Any], beside: dict[str, Any]
) -> None:
    for seed, dtype in enumerate(("float32", "bfloat16")):
        check(_case(device, head_dim, **terms, **beside, dtype=dtype, seed=seed), backward=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", CUDA_FAMILIES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_every_family_is_within_the_error_bound(family: str, head_dim: int) -> None:
    with _family(family) as device:
        for beside in BESIDE.values():
            check(_case(device, head_dim, **ALL, **beside, dtype="bfloat16"), backward=True)


def _state(seed: int, offset: int = 3, device: str = "cpu") -> Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def _uniform(seqlen_q: int, seqlen_k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of which out is dropout's factor of each pair, divided by seqlen_k: all scores are
    0, and v is the identity."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k = (
        torch.zeros(2, n, 3, seqlen_k, device=device, dtype=dtype) for n in (seqlen_q, seqlen_k)
    )
    v = torch.eye(seqlen_k, device=device, dtype=dtype)[:, None].expand(2, -1, 3, -1)
    return q, k, v


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 256), (77, 128), (129, 64)])
@pytest.mark.parametrize("window", [(-1, -1), (40, 21)], ids=str)
def test_both_passes_of_every_family_keep_the_same(
    family: str, dropout_p: float, seqlen_q: int, seqlen_k: int, window: tuple[int, int]
) -> None:
    """What is kept, as read from out and from dv; a window shifts the tiles that the CPU takes."""
    kept = lowlevel.dropout_mask(_state(7, 2**40 + 1), dropout_p, 2, 3, seqlen_q, seqlen_k)
    with _family(family) as device:
        state = _state(7, 2**40 + 1, device)
        on_device = lowlevel.dropout_mask(state, dropout_p, 2, 3, seqlen_q, seqlen_k)
        assert torch.equal(on_device.cpu(), kept)
        q, k, v = _uniform(seqlen_q, seqlen_k, device)
        options = {"dropout_p": dropout_p, "rng_state": state, "window_size": window}
        out, lse, _ = lowlevel.forward(q, k, v, **options)
        plain, plain_lse = lowlevel.forward(q, k, v, window_size=window)
        torch.testing.assert_close(lse, plain_lse, rtol=1e-6, atol=1e-6)
        seen = plain.transpose(1, 2).cpu() != 0  # (batch, heads, seqlen_q, seqlen_k)
        assert torch.equal(out.transpose(1, 2).cpu() != 0, kept & seen)
        factor = out.float() / plain.float().masked_fill(plain == 0, 1.0)
        expected = 1 / keep_probability(dropout_p)
        torch.testing.assert_close(
            factor[factor != 0], torch.full_like(factor[factor != 0], expected), rtol=2e-3, atol=0
        )
        # Of one query at a time: dv then is that query's row.
        for query in (0, 1, 8, seqlen_q // 2, seqlen_q - 1):
            dout = torch.zeros_like(out)
            dout[:, query] = 1
            found = lowlevel.backward(dout, q, k, v, out, lse, **options)
            row = found.dv[..., 0].transpose(1, 2).cpu() != 0
            assert torch.equal(row, (kept & seen)[:, :, query])


@pytest.mark.parametrize("dropout_p", [0.1, 0.17, 0.5, 0.9])
def test_the_rate_is_within_four_sigma(device: str, dropout_p: float) -> None:
    probability = keep_probability(dropout_p)
    assert abs(probability - (1 - dropout_p)) <= 2**-17
    for seed in range(5):
        kept = lowlevel.dropout_mask(_state(seed, device=device), dropout_p, 4, 4, 256, 512)
        sigma = math.sqrt(probability * (1 - probability) / kept.numel())
        assert abs(kept.double().mean().item() - probability) < 4 * sigma
        # And within each head, query and key, allowing for how many there are of these.
        for dims, sigmas in (((2, 3), 5), ((0, 1, 3), 6), ((0, 1, 2), 6)):
            mean = kept.double().mean(dim=dims)
            sigma = math.sqrt(probability * (1 - probability) / (kept.numel() / mean.numel()))
            assert (mean - probability).abs().max() < sigmas * sigma


def test_a_longer_mask_begins_with_a_shorter_one(device: str) -> None:
    state = _state(5, device=device)
    long = lowlevel.dropout_mask(state, 0.4, 3, 4, 100, 200)
    assert torch.equal(lowlevel.dropout_mask(state, 0.4, 2, 4, 37, 101), long[:2, :, :37, :101])


def _qkv(device: str, seqlen: int = 70, **options: Any) -> list[Tensor]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    return [torch.randn(2, seqlen, 4, 64, device=device, dtype=dtype, **options) for _ in range(3)]


def test_dropout_is_drawn_from_a_generator(device: str) -> None:
    qkv = _qkv(device)

    def out(generator: torch.Generator | None = None) -> Tensor:
        return flash_attn_func(*qkv, dropout_p=0.3, generator=generator)

    torch.manual_seed(3)
    first, second = out(), out()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(out(), first)
    generator = torch.Generator(device).manual_seed(9)
    of_generator = out(generator)
    assert torch.equal(out(generator.manual_seed(9)), of_generator)
    assert not torch.equal(out(generator), of_generator)
    assert torch.equal(out(), second)  # whose generator has not moved


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_same(device: str, use_reentrant: bool) -> None:
    qkv = _qkv(device, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, dropout_p=0.4, deterministic=True)

    torch.manual_seed(1)
    plain = torch.autograd.grad(attention(*qkv).square().sum(), qkv)
    torch.manual_seed(1)
    out = checkpoint(attention, *qkv, use_reentrant=use_reentrant)
    torch.rand(5, device=device)  # what comes between the passes has no influence
    out.square().sum().backward()
    for tensor, gradient in zip(qkv, plain, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_at_every_replay() -> None:
    """And what a call draws that is not captured, of a generator with the same offset."""
    replays, seed = 1000, 17
    q, k, v = _uniform(64, 64, "cuda")
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    flash_attn_func(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v_leaf = v.detach().contiguous().requires_grad_()
        out = flash_attn_func(q, k, v_leaf, dropout_p=0.5)
        (dv,) = torch.autograd.grad(out, v_leaf, torch.ones_like(out))
    torch.cuda.manual_seed(seed)
    masks = set()
    for _ in range(replays):
        other = torch.Generator("cuda").manual_seed(seed)
        other.set_offset(generator.get_offset())
        graph.replay()
        assert torch.equal(out, flash_attn_func(q, k, v, dropout_p=0.5, generator=other))
        kept = (out != 0).transpose(1, 2)  # (batch, heads, seqlen_q, seqlen_k)
        counts = (dv[..., 0].float() * 32).round()  # of queries that keep a key, in forward's terms
        assert torch.equal(counts.transpose(1, 2), kept.sum(2).float())
        masks.add(kept.cpu().numpy().tobytes())
    assert len(masks) == replays


def test_everything_dropped_is_zero(device: str) -> None:
    qkv = _qkv(device, requires_grad=True)
    out, lse = flash_attn_func(*qkv, dropout_p=1.0, return_lse=True)
    assert (out == 0).all()
    assert lse.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), qkv):
        assert (gradient == 0).all()


def test_a_query_that_sees_nothing_has_its_sink_as_lse(device: str) -> None:
    q, k, v = _qkv(device, requires_grad=True)
    sinks = torch.tensor([0.5, -3.0, -math.inf, 40.0], device=device, requires_grad=True)
    mask = torch.ones(70, 70, dtype=torch.bool, device=device)
    mask[20:50] = False
    out, lse = flash_attn_func(q, k, v, sinks=sinks, attn_mask=mask, return_lse=True)
    assert (out[:, 20:50] == 0).all()
    expected = sinks.detach()[:, None].expand(2, -1, 30)
    torch.testing.assert_close(lse[:, :, 20:50], expected, rtol=1e-6, atol=0)
    # d lse / d sink is 1 where nothing else is seen, and what reaches out finds nothing there.
    dlse = torch.zeros_like(lse)
    dlse[:, :, 20:50] = 1
    dout = torch.zeros_like(out)
    dout[:, 20:50] = 7
    dq, dk, dv, dsinks = torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse))
    for gradient in (dq, dk, dv):
        assert (gradient == 0).all()
    torch.testing.assert_close(dsinks, torch.tensor([60.0, 60.0, 0.0, 60.0], device=device))


def test_a_sink_of_minus_infinity_is_none(device: str) -> None:
    qkv = _qkv(device)
    sinks = torch.full((4,), -math.inf, device=device)
    mask = torch.rand(70, 70, device=device) < 0.5
    with_sinks = flash_attn_func(*qkv, sinks=sinks, attn_mask=mask, return_lse=True)
    without = flash_attn_func(*qkv, attn_mask=mask, return_lse=True)
    assert all(map(torch.equal, with_sinks, without))


def test_a_sink_is_a_key_without_a_value(device: str) -> None:
    """A key that scores the sink of every query, with a value of 0."""
    q, k, v = _qkv(device)
    bias = torch.zeros(4, 1, 71, device=device)
    sinks = torch.randn(4, device=device)
    bias[:, 0, 70] = sinks
    longer_k, longer_v = (torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for x in (k, v))
    expected = flash_attn_func(q, longer_k, longer_v, attn_bias=bias, return_lse=True)
    results = flash_attn_func(q, k, v, sinks=sinks, return_lse=True)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if device == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slopes_and_sinks_have_gradients_in_their_dtype(device: str, dtype: torch.dtype) -> None:
    q, k, v = _qkv(device)
    slopes = torch.rand(2, 4, device=device).to(dtype).requires_grad_()
    sinks = torch.randn(4, device=device).to(dtype).requires_grad_()
    out = flash_attn_func(q, k, v, alibi_slopes=slopes, sinks=sinks)
    out.square().sum().backward()
    for tensor in (slopes, sinks):
        assert tensor.grad.dtype == dtype
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad != 0).all()


def test_the_largest_score_has_no_gradient(device: str) -> None:
    qkv = _qkv(device, requires_grad=True)
    out, max_logit = flash_attn_func(*qkv, return_max_logit=True)
    assert out.requires_grad
    assert not max_logit.requires_grad
    assert max_logit.shape == (4,)
    out, lse, max_logit = flash_attn_func(*qkv, return_max_logit=True, return_lse=True)
    assert lse.shape == (2, 4, 70)
    expected = attention_scores(*(x.detach() for x in qkv[:2])).amax(dim=(0, 2, 3))
    torch.testing.assert_close(max_logit.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_largest_score_of_nothing_is_minus_infinity(device: str) -> None:
    q, k, v = _qkv(device)
    hidden = torch.zeros(4, 1, 1, dtype=torch.bool, device=device)
    hidden[2] = True
    _, max_logit = flash_attn_func(q, k, v, attn_mask=hidden, return_max_logit=True)
    assert (max_logit == -math.inf).tolist() == [True, True, False, True]
    _, max_logit = flash_attn_func(q, k[:, :0], v[:, :0], return_max_logit=True)
    assert (max_logit == -math.inf).all()
    _, max_logit = flash_attn_func(q[:, :0], k, v, return_max_logit=True)
    assert (max_logit == -math.inf).all()


NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dslopes", "dsinks", "max_logit")


@on_head_dims
@pytest.mark.parametrize("beside", BESIDE.values(), ids=list(BESIDE))
def test_deterministic_results_repeat_bit_for_bit(
    device: str, head_dim: int, beside: dict[str, Any]
) -> None:
    case = _case(device, head_dim, **ALL, **beside, dtype="bfloat16", deterministic=True)
    inputs = make_inputs(case)
    first = run(case, inputs, backward=True)
    for _ in range(3):
        again = run(case, inputs, backward=True)
        for name in NAMES:
            if getattr(first, name) is not None:
                assert_bitwise_equal(name, getattr(again, name), getattr(first, name))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    case = _case("cpu", CPU_HEAD_DIM, **ALL, heads_kv=1, bias="hk", causal=True)
    inputs = make_inputs(case)
    expected = run(case, inputs, backward=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = run(case, inputs, backward=True)
    finally:
        torch.set_num_threads(before)
    for name in NAMES:
        assert_bitwise_equal(name, getattr(results, name), getattr(expected, name))


@on_head_dims
def test_packed_sequences_are_a_padded_batch(device: str, head_dim: int) -> None:
    """Positions, and so ALiBi and dropout, count from the first row of each sequence."""
    case = _case(device, head_dim, **ALL, batch=4, causal=True, deterministic=True)
    case = dataclasses.replace(case, varlen=True, lengths="qk")
    inputs = make_inputs(case)
    packed = run(case, inputs, backward=False)
    rows_q, rows_k = inputs.packing_q, inputs.packing_k
    q = rows_q.unpack(inputs.q, case.seqlen_q)
    k, v = (rows_k.unpack(x, case.seqlen_k) for x in (inputs.k, inputs.v))
    lengths = {"seqlens_q": rows_q.lengths.to(device), "seqlens_k": rows_k.lengths.to(device)}
    padded_case = dataclasses.replace(case, varlen=False)
    padded = run(
        padded_case, dataclasses.replace(inputs, q=q, k=k, v=v, rules=lengths), backward=False
    )
    assert_bitwise_equal("out", packed.out, rows_q.pack(padded.out, 0.0))
    lse = rows_q.pack(padded.lse.transpose(1, 2), -math.inf).T
    assert_bitwise_equal("lse", packed.lse, lse)
    assert_bitwise_equal("max_logit", packed.max_logit, padded.max_logit)


@pytest.mark.parametrize("varlen", [False, True])
def test_s_dmask_is_the_probabilities_signed_by_dropout(device: str, varlen: bool) -> None:
    fields = {"bias": "hqk", "sinks": "normal", "alibi": "h", "softcap": 3.0, "dropout": 0.4}
    case = _case(device, 32, **fields, batch=3, causal=True, varlen=varlen, seqlen_q=60)
    inputs = make_inputs(case)
    bias = inputs.bias.nan_to_num(nan=0.5)
    q, k, v = inputs.q, inputs.k, inputs.v
    generator = torch.Generator(device).manual_seed(case.seed)
    options = {"softcap": case.softcap, "attn_bias": bias, "causal": True, **inputs.terms}
    attention = flash_attn_varlen_func if varlen else flash_attn_func
    out, lse, signed, max_logit = attention(
        *(q, k, v),
        **options,
        **inputs.rules,
        dropout_p=case.dropout,
        generator=generator,
        return_attn_probs=True,
        return_max_logit=True,
    )
    assert max_logit.shape == (4,)
    if varlen:
        q = inputs.packing_q.unpack(q, case.seqlen_q)
        k, v = (inputs.packing_k.unpack(x, case.seqlen_k) for x in (k, v))
        out = inputs.packing_q.unpack(out, case.seqlen_q)
        lse = inputs.packing_q.unpack(lse.T, case.seqlen_q).transpose(1, 2)
    assert signed.shape == (3, 4, 60, 150)
    kept = kept_of(case)
    sinks = options.pop("sinks")
    scores = attention_scores(q, k, **options, **inputs.visibility)
    assert (scores == -math.inf).any()
    probabilities = torch.exp(scores - lse.double()[..., None]).nan_to_num(nan=0.0)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(signed.abs().double(), probabilities, **tolerance)
    some = signed != 0
    assert torch.equal((signed > 0)[some], kept[some])
    dropped = signed.double().relu() / keep_probability(case.dropout)
    torch.testing.assert_close(
        (dropped @ v.double().transpose(1, 2)).transpose(1, 2), out.double(), rtol=2e-2, atol=2e-2
    )
    assert sinks.shape == (4,)


def test_low_level_passes_are_those_of_autograd(device: str) -> None:
    case = _case(device, 64, **ALL, dtype="bfloat16", bias="hk", causal=True, deterministic=True)
    inputs = make_inputs(case)
    expected = run(case, inputs, backward=True)
    state = lowlevel.new_rng_state(
        torch.device(device), torch.Generator(device).manual_seed(case.seed)
    )
    options = {**case.mask_arguments, **inputs.terms, "attn_bias": inputs.bias}
    options |= {"softcap": case.softcap, "dropout_p": case.dropout, "rng_state": state}
    qkv = (inputs.q, inputs.k, inputs.v)
    out, lse, max_logit, returned = lowlevel.forward(*qkv, **options, return_max_logit=True)
    assert returned is state
    found = lowlevel.backward(
        inputs.dout,
        *(*qkv, out, lse),
        dlse=inputs.dlse,
        deterministic=True,
        **dict.fromkeys(("needs_dbias", "needs_dslopes", "needs_dsinks"), True),
        **options,
    )
    for name, result in (("out", out), ("lse", lse), ("max_logit", max_logit)):
        assert_bitwise_equal(name, result, getattr(expected, name))
    for name in ("dq", "dk", "dv", "dbias", "dslopes", "dsinks"):
        actual, wanted = getattr(found, name), getattr(expected, name)
        assert_bitwise_equal(name, actual.to(wanted.dtype), wanted)
    fewer = lowlevel.backward(inputs.dout, *qkv, out, lse, **options)
    assert fewer.dbias is fewer.dslopes is fewer.dsinks is None


def test_low_level_dropout_without_a_state_draws_one_and_returns_it(device: str) -> None:
    qkv = _qkv(device)
    out, lse, state = lowlevel.forward(*qkv, dropout_p=0.5)
    assert state.dtype == torch.int64
    assert state.shape == (2,)
    assert (state >= 0).all()
    again = lowlevel.forward(*qkv, dropout_p=0.5, rng_state=state)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    with pytest.raises(ValueError, match=r"^rng_state: expected what forward returned"):
        lowlevel.backward(out, *qkv, out, lse, dropout_p=0.5)


def test_parts_of_the_keys_with_alibi_and_one_sink() -> None:
    """Each part by lengths that keep its keys' places is more than it can say: here the parts are
    of a mask."""
    q, k, v = (x.double() for x in _qkv("cpu"))
    slopes, sinks = torch.rand(4).double(), torch.randn(4).double()
    options: dict[str, Any] = {"softcap": 4.0, "alibi_slopes": slopes}
    first = torch.arange(70).expand(2, 70) < 30
    one = lowlevel.forward(q, k, v, key_padding_mask=first, sinks=sinks, **options)
    other = lowlevel.forward(q, k, v, key_padding_mask=~first, **options)
    merged = lowlevel.merge(*one, *other)
    whole = attention_ref(q, k, v, sinks=sinks, **options)
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "bhqk", "mask": "bhqk", "alibi": "bh", "sinks": "normal"},
        {"bias": "hk", "heads_kv": 1, "lengths": "qk", "causal": True, "alibi": "h"},
        {"bias": "q", "window": (2, 1), "dropout": 0.4, "sinks": "normal", "alibi": "bh"},
        {"bias": "bqk", "varlen": True, "causal": True, "alibi": "bh", "sinks": "normal"},
        {"bias": "", "heads_kv": 1, "dropout": 0.6, "sinks": "normal", "alibi": "h"},
    ],
    ids=str,
)
def test_gradcheck(fields: dict[str, Any]) -> None:
    """Of q, k, v, bias, slopes and sinks together, through softcap, out and LSE."""
    plain = {"seqlen_q": 5, "seqlen_k": 5, "head_dim": 4, "dtype": "float64", "softcap": 1.5}
    case = Case(**{**plain, **fields})
    inputs = make_inputs(case)
    arguments = {**case.mask_arguments, **inputs.rules, "softcap": case.softcap}
    attention = flash_attn_varlen_func if case.varlen else flash_attn_func
    leaves = [x.nan_to_num(nan=0.5) for x in (inputs.q, inputs.k, inputs.v, inputs.bias)]
    leaves += inputs.terms.values()

    def results(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *terms: Tensor
    ) -> tuple[Tensor, ...]:
        named = dict(zip(inputs.terms, terms, strict=True))
        generator = torch.Generator().manual_seed(5)
        out, lse = attention(
            *(q, k, v),
            dropout_p=case.dropout,
            attn_bias=bias,
            generator=generator,
            return_lse=True,
            **named,
            **arguments,
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(results, [x.detach().requires_grad_() for x in leaves])
