# SPDX-License-Identifier: BSD-3-Clause
"""Lengths, biases and masks: what they promise beyond results within the error bound."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn_cuda.reference import visible_pairs
from tests.support.cases import Case, Inputs, make_inputs
from tests.support.compare import (
    Results,
    assert_bitwise_equal,
    assert_within_bound,
    check,
    expected_of,
    run,
)
from tests.support.suite import DTYPES

# The CPU's kernels run every head_dim alike; each CUDA kernel has its own tiles.
CUDA_HEAD_DIMS = (64, 96, 128, 192, 256, 512)
on_head_dims = pytest.mark.parametrize(
    ("device", "head_dim"),
    [
        ("cpu", 32),
        *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in CUDA_HEAD_DIMS),
    ],
)
NAMES = [field.name for field in dataclasses.fields(Results)]
# Every kind of rule that hides pairs, alone and together.
RULES: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 9)},
    "mask": {"mask": "bhqk"},
    "mask of keys": {"mask": "k"},
    "mask of queries": {"mask": "bhq"},
    "padding left": {"padding": "left"},
    "padding right": {"padding": "right"},
    "documents": {"documents": "runs"},
    "shuffled documents": {"documents": "shuffled"},
    "blocks": {"block_mask": "bhqk"},
    "lengths": {"lengths": "qk"},
    "prefix": {"causal": True, "prefix": True},
    "holes in the bias": {"bias_data": "holes"},
    "all": {
        "causal": True,
        "prefix": True,
        "mask": "bhqk",
        "padding": "left",
        "block_mask": "hqk",
        "documents": "runs",
        "lengths": "same",
        "bias_data": "holes",
        "density": 0.9,
    },
}
on_rules = pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))


def _case(device: str, head_dim: int = 32, **fields: Any) -> Case:
    plain = {"seqlen_q": 150, "seqlen_k": 150, "heads": 4, "bias": "bhqk", "dlse": True, "seed": 1}
    return Case(**{**plain, **fields}, head_dim=head_dim, deterministic=True).on(device)


def _assert_same_bits(case: Case, actual: Results, expected: Results) -> None:
    for name in NAMES:
        if getattr(expected, name) is not None:
            assert_bitwise_equal(
                name, getattr(actual, name), getattr(expected, name), case.command()
            )


def _assert_within_bound(case: Case, actual: Results, inputs: Inputs) -> None:
    expected = expected_of(case, inputs, backward=True)
    for name, value in expected.values.items():
        assert_within_bound(
            name, getattr(actual, name), value, expected.bounds[name], case.command()
        )


def _visible(case: Case, inputs: Inputs) -> Tensor:
    visible = visible_pairs(
        case.seqlen_q,
        case.seqlen_k,
        causal=case.causal,
        window_size=case.window,
        device=case.device,
        **inputs.visibility,
    )
    if inputs.bias is not None:
        visible = visible & (inputs.bias != -math.inf)
    return visible.expand(case.batch, case.heads, case.seqlen_q, case.seqlen_k)


@on_rules
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_query_does_not_see_changes_no_bit_of_its_row(
    device: str, head_dim: int, dtype: str, rules: dict[str, Any]
) -> None:
    case = _case(device, head_dim, dtype=dtype, **rules)
    inputs = make_inputs(case)
    before = run(case, inputs, backward=True)
    changed = torch.zeros(case.seqlen_k, dtype=torch.bool, device=device)
    changed[40:90] = True
    blind = ~(_visible(case, inputs) & changed).any(dim=(1, 3))  # (batch, seqlen_q)
    largest = torch.finfo(case.torch_dtype).max
    inputs.k[:, changed], inputs.v[:, changed] = largest, -largest
    after = run(case, inputs, backward=True)
    for name in ("out", "dq"):
        assert_bitwise_equal(name, getattr(after, name)[blind], getattr(before, name)[blind])
    lse_after, lse_before = (x.lse.transpose(1, 2)[blind] for x in (after, before))
    assert_bitwise_equal("lse", lse_after, lse_before)


@on_rules
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_every_case_hides_pairs(head_dim: int, rules: dict[str, Any]) -> None:
    """Lengths and prefixes are drawn after the values, so that they differ by head_dim."""
    case = _case("cpu", head_dim, **rules)
    inputs = make_inputs(case)
    assert inputs.bias.isnan().any() or case.bias_data == "holes"
    assert not _visible(case, inputs).all()


@on_rules
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_of_hidden_pairs_changes_no_bit(
    device: str, head_dim: int, dtype: str, rules: dict[str, Any]
) -> None:
    case = _case(device, head_dim, dtype=dtype, **rules)
    inputs = make_inputs(case)
    hidden = inputs.bias.isnan()
    assert hidden.any() or case.bias_data == "holes"
    with_nan = run(case, inputs, backward=True)
    inputs.bias.masked_fill_(hidden, 7.0)
    with_numbers = run(case, inputs, backward=True)
    assert (with_nan.dbias[hidden] == 0).all()
    _assert_same_bits(case, with_nan, with_numbers)


@on_rules
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_is_zero_and_minus_infinity(
    device: str, head_dim: int, dtype: str, rules: dict[str, Any]
) -> None:
    case = _case(device, head_dim, dtype=dtype, **{**rules, "mask": "bhqk"})
    inputs = make_inputs(case)
    inputs.rules["attn_mask"][0, :, 10:140] = False
    inputs.rules["attn_mask"][1, 1, :, 20:] = False
    inputs.rules["attn_mask"][1, 2] = False
    visible = _visible(case, inputs)
    results = run(case, inputs, backward=True)
    blind = ~visible.any(3)  # (batch, heads, seqlen_q)
    unseen = ~visible.unflatten(1, (case.heads_kv, -1)).any(dim=(2, 3))
    assert (results.out.transpose(1, 2)[blind] == 0).all()
    assert (results.lse[blind] == -math.inf).all()
    assert results.lse[~blind].isfinite().all()
    assert (results.dq.transpose(1, 2)[blind] == 0).all()
    assert (results.dbias[~visible] == 0).all()
    for gradient in (results.dk, results.dv):
        assert (gradient.transpose(1, 2)[unseen] == 0).all()
        assert gradient.isfinite().all()


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_that_hide_nothing(device: str, head_dim: int, dtype: str) -> None:
    plain = _case(device, head_dim, dtype=dtype, bias=None, causal=True)
    masked = dataclasses.replace(
        plain, mask="bhqk", block_mask="qk", padding="random", density=1.0, bias="qk"
    )
    inputs, expected = make_inputs(masked), make_inputs(plain)
    inputs.bias.zero_()
    results = run(masked, inputs, backward=True)
    _assert_within_bound(plain, dataclasses.replace(results, dbias=None), expected)


@on_head_dims
def test_a_mask_means_the_same_as_bits_and_as_bytes(device: str, head_dim: int) -> None:
    """Of few queries in many heads Hopper's kernels read bytes, and of one batch entry bits."""
    shape = {"batch": 4, "heads": 48, "heads_kv": 6, "seqlen_q": 5, "seqlen_k": 1000}
    case = _case(device, head_dim, dtype="bfloat16", bias=None, mask="bhqk", **shape)
    inputs = make_inputs(case)
    together = run(case, inputs, backward=True)
    for b in range(case.batch):
        one = slice(b, b + 1)
        alone = dataclasses.replace(
            inputs,
            **{name: getattr(inputs, name)[one] for name in ("q", "k", "v", "dout", "dlse")},
            rules={"attn_mask": inputs.rules["attn_mask"][one]},
        )
        part = Results(*(x if x is None else x[one] for x in vars(together).values()))
        _assert_same_bits(case, run(case, alone, backward=True), part)


@on_head_dims
@pytest.mark.parametrize("step", [1, 8])  # with 8, rows begin at multiples of 16 bytes
def test_rows_of_biases_and_masks_may_overlap(device: str, head_dim: int, step: int) -> None:
    case = _case(device, head_dim, dtype="bfloat16", bias="hqk", mask="hqk", causal=True)
    inputs = make_inputs(case)
    shape = (1, case.heads, case.seqlen_q, case.seqlen_k)
    of_head = 8 * math.ceil((step * (case.seqlen_q - 1) + case.seqlen_k) / 8)

    def overlap(memory: Tensor) -> Tensor:
        return memory.to(device).as_strided(shape, (0, of_head, step, 1))

    generator = case.generator()
    bias = torch.randn(case.heads, of_head, generator=generator, dtype=torch.bfloat16)
    mask = {"attn_mask": overlap(torch.rand(case.heads, of_head, generator=generator) < 0.7)}
    inputs = dataclasses.replace(
        inputs,
        bias=overlap(bias),
        rules=inputs.rules | mask,
        visibility=inputs.visibility | mask,
    )
    _assert_within_bound(case, run(case, inputs, backward=True), inputs)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", ["", "qk"])
def test_packed_sequences_are_separate_calls(
    device: str, head_dim: int, dtype: str, lengths: str
) -> None:
    case = _case(
        device,
        head_dim,
        dtype=dtype,
        batch=5,
        varlen=True,
        lengths=lengths,
        causal=True,
        prefix=True,
    )
    inputs = make_inputs(case)
    together = run(case, inputs, backward=True)
    for index in range(case.batch):
        q_rows, k_rows = (
            slice(int(p.cu_seqlens[index]), int(p.cu_seqlens[index] + p.lengths[index]))
            for p in (inputs.packing_q, inputs.packing_k)
        )
        bias = inputs.bias[index : index + 1]
        bias = bias[:, :, : q_rows.stop - q_rows.start, : k_rows.stop - k_rows.start]
        alone = Inputs(
            *(
                x[None, rows]
                for x, rows in zip(
                    (inputs.q, inputs.k, inputs.v), (q_rows, k_rows, k_rows), strict=True
                )
            ),
            dout=inputs.dout[None, q_rows],
            dlse=inputs.dlse[None, :, q_rows],
            buffers=(),
            bias=bias,
            rules={"prefix_lens": inputs.rules["prefix_lens"][index : index + 1]},
        )
        separate = run(dataclasses.replace(case, varlen=False), alone, backward=True)
        for name, rows in (("out", q_rows), ("dq", q_rows), ("dk", k_rows), ("dv", k_rows)):
            joint = getattr(together, name)[rows]
            assert_bitwise_equal(name, joint, getattr(separate, name)[0], case.command())
        assert_bitwise_equal("lse", together.lse[:, q_rows], separate.lse[0], case.command())


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_documents_are_packed_sequences(
    device: str, head_dim: int, dtype: str, causal: bool
) -> None:
    plain = {"batch": 1, "seqlen_q": 301, "seqlen_k": 301, "bias": None, "dtype": dtype}
    case = _case(device, head_dim, **plain, documents="runs", causal=causal)
    inputs = make_inputs(case)
    ids = inputs.rules["document_ids"][0].cpu()
    ends = [*(ids.diff().nonzero().flatten() + 1).tolist(), len(ids)]
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    leaves = [x.detach()[0].requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = flash_attn_varlen_func(
        *leaves, cu_seqlens, cu_seqlens, causal=causal, deterministic=True, return_lse=True
    )
    gradients = torch.autograd.grad((out, lse), leaves, (inputs.dout[0], inputs.dlse[0]))
    packed = Results(*(x[None] for x in (out, lse, *gradients)))
    _assert_within_bound(case, packed, inputs)
    _assert_within_bound(case, run(case, inputs, backward=True), inputs)


@on_head_dims
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_a_shorter_sequence(device: str, head_dim: int, side: str) -> None:
    case = _case(device, head_dim, dtype="bfloat16", batch=1, bias=None)
    inputs = make_inputs(case)
    kept = slice(37, None) if side == "left" else slice(0, 113)
    mask = torch.zeros(1, case.seqlen_k, dtype=torch.bool, device=device)
    mask[:, kept] = True
    masked = dataclasses.replace(inputs, rules={"key_padding_mask": mask})
    shorter = dataclasses.replace(inputs, k=inputs.k[:, kept], v=inputs.v[:, kept])
    results = run(case, masked, backward=True)
    assert (results.dk[~mask] == 0).all()
    assert (results.dv[~mask] == 0).all()
    cut = dataclasses.replace(results, dk=results.dk[:, kept], dv=results.dv[:, kept])
    _assert_within_bound(case, cut, shorter)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", ["bhqk", "qk", "hq", "bk"])
def test_a_block_mask_is_its_mask_of_pairs(
    device: str, head_dim: int, dtype: str, dims: str
) -> None:
    case = _case(device, head_dim, dtype=dtype, seqlen_q=300, seqlen_k=400, block_mask=dims)
    inputs = make_inputs(case)
    by_blocks = run(case, inputs, backward=True)
    pairs = inputs.rules["block_mask"]
    for dim, seqlen in ((2, case.seqlen_q), (3, case.seqlen_k)):
        if pairs.shape[dim] > 1:
            pairs = pairs.repeat_interleave(128, dim=dim).narrow(dim, 0, seqlen)
    by_pairs = run(case, dataclasses.replace(inputs, rules={"attn_mask": pairs}), backward=True)
    _assert_same_bits(case, by_blocks, by_pairs)


@on_rules
@on_head_dims
@pytest.mark.parametrize("bias", ["bhqk", "hk", ""])
def test_deterministic_results_repeat_bit_for_bit(
    device: str, head_dim: int, bias: str, rules: dict[str, Any]
) -> None:
    case = _case(device, head_dim, dtype="bfloat16", heads_kv=2, **{**rules, "bias": bias})
    inputs = make_inputs(case)
    first = run(case, inputs, backward=True)
    for _ in range(5):
        _assert_same_bits(case, run(case, inputs, backward=True), first)


@on_head_dims
def test_the_gradient_of_a_bias_repeats_bit_for_bit_in_any_pass(device: str, head_dim: int) -> None:
    case = _case(device, head_dim, dtype="bfloat16", bias="hk")
    case = dataclasses.replace(case, deterministic=False)
    inputs = make_inputs(case)
    first = run(case, inputs, backward=True)
    for _ in range(10):
        again = run(case, inputs, backward=True)
        assert_bitwise_equal("dbias", again.dbias, first.dbias)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    case = _case("cpu", heads_kv=2, bias="hk", mask="bhqk", causal=True)
    inputs = make_inputs(case)
    expected = run(case, inputs, backward=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = run(case, inputs, backward=True)
    finally:
        torch.set_num_threads(before)
    _assert_same_bits(case, results, expected)


def test_an_expanded_bias_has_a_gradient_of_its_full_shape(device: str) -> None:
    for dims in ("", "k", "bq"):
        case = _case(device, bias=dims, rule_layout="expanded")
        results = check(case, backward=True)
        assert results.dbias.shape == (case.batch, case.heads, case.seqlen_q, case.seqlen_k)


def test_nan_that_reaches_a_row_that_sees_nothing_goes_no_further(device: str) -> None:
    case = _case(device, dtype="bfloat16", mask="bhqk", lengths="k")
    inputs = make_inputs(case)
    inputs.rules["attn_mask"][:, :, 30:70] = False
    blind = ~_visible(case, inputs).any(3)
    inputs.dlse[blind] = math.nan
    results = run(case, inputs, backward=True)
    for gradient in (results.dq, results.dk, results.dv, results.dbias):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lengths", ["", "same"])
def test_packed_tensors_of_packed_sequences(device: str, lengths: str) -> None:
    dtype = "bfloat16" if device == "cuda" else "float32"
    case = _case(
        device, dtype=dtype, varlen=True, lengths=lengths, layout="packed", heads_kv=4, causal=True
    )
    inputs = make_inputs(case)
    expected = run(case, inputs, backward=False)
    q, k, v = inputs.q, inputs.k, inputs.v
    rules = dict(inputs.rules)
    cu_seqlens = rules.pop("cu_seqlens_q")
    options = {"causal": True, "attn_bias": inputs.bias, "return_lse": True}
    of_both = {"seqused": rules["seqused_q"]} if lengths else {}
    for out, lse in (
        flash_attn_varlen_qkvpacked_func(
            torch.stack([q, k, v], dim=1), cu_seqlens, **options, **of_both
        ),
        flash_attn_varlen_kvpacked_func(
            q, torch.stack([k, v], dim=1), cu_seqlens, rules.pop("cu_seqlens_k"), **options, **rules
        ),
    ):
        assert_bitwise_equal("out", out, expected.out)
        assert_bitwise_equal("lse", lse, expected.lse)


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "bhqk", "mask": "bhqk", "head_dim_v": 3},
        {"bias": "hk", "heads_kv": 1, "lengths": "qk", "causal": True},
        {"bias": "", "window": (2, 1), "prefix": True},
        {"bias": "q", "documents": "runs", "padding": "right"},
        {"bias": "bqk", "varlen": True, "causal": True},
    ],
    ids=str,
)
def test_gradcheck(fields: dict[str, Any]) -> None:
    case = Case(
        **{"seqlen_q": 5, "seqlen_k": 5, "head_dim": 4, "dtype": "float64", "dlse": True, **fields}
    )
    inputs = make_inputs(case)
    arguments = {**case.mask_arguments, **inputs.rules, "return_lse": True}
    attention = flash_attn_varlen_func if case.varlen else flash_attn_func
    leaves = [x.nan_to_num(nan=0.5) for x in (inputs.q, inputs.k, inputs.v, inputs.bias)]

    def results(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, attn_bias=bias, **arguments)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(results, [x.requires_grad_() for x in leaves])
