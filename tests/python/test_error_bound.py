# SPDX-License-Identifier: BSD-3-Clause
"""The error bound itself: its values are exact, a correct kernel stays inside, a bug does not.

A kernel is modelled here: float64 but for the roundings to 16 bits that a kernel makes. Mutants of
the model make one error each.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda.reference import attention_ref, attention_scores, attention_varlen_ref
from tests.support import compare
from tests.support.cases import Case, make_inputs
from tests.support.compare import (
    CONSTANTS,
    error_ratio,
    expected_of,
    expected_with_bounds,
    kept_of,
)

RESULTS = ("out", "lse", "dq", "dk", "dv")
HEADS, HEAD_DIM = 2, 64
TILE = slice(64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def draw(seqlen_q: int, seqlen_k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, dout and dlse."""
    shapes = [(1, seqlen, HEADS, HEAD_DIM) for seqlen in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)]
    q, k, v, dout = (torch.randn(shape).to(dtype) for shape in shapes)
    return (
        q,
        k,
        v,
        dout,
        torch.randn(1, HEADS, seqlen_q).to(torch.promote_types(dtype, torch.float)),
    )


def model(inputs: tuple[Tensor, ...], mutant: str = "") -> dict[str, Tensor]:
    """What a kernel returns that rounds P, dS and results to the dtype of its inputs."""
    dtype = inputs[0].dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    q, k, v, dout = (x.double().transpose(1, 2) for x in inputs[:4])
    dlse = inputs[4].double()[..., None]
    scale = HEAD_DIM**-0.5
    scores = scale * q @ k.mT
    if mutant == "scores are rounded":
        scores = rounded(scores)
    if mutant == "q is scaled by 1.004":
        scores = 1.004 * scores
    if mutant == "key at a tile's edge is dropped":
        scores[..., TILE.stop - 1] = -math.inf
    if mutant == "tile of keys is seen twice":
        scores[..., TILE] += math.log(2)
    # Up to 8 octaves below the maximum, as in csrc/device/softmax.cuh.
    maximum = scores.amax(-1, keepdim=True)
    base = maximum - 8 * math.log(2) * torch.rand_like(maximum)
    p = torch.exp(scores - base)
    sums = p.sum(-1, keepdim=True)
    out = rounded(p) @ v / sums
    if mutant == "p is rounded twice":
        out = rounded(rounded(p) / sums) @ v
    lse = base + sums.log()
    if mutant == "lse of a row is off by 1e-3":
        lse[0, 0, 1] += 1e-3
    if mutant == "sums are kept in 16 bits":
        lse = base + rounded(sums).log()
    out = rounded(out)

    p = torch.exp(scores - lse)
    delta = (dout * out).sum(-1, keepdim=True)
    if mutant != "gradient of the LSE is ignored":
        delta = delta - dlse
    ds = p * (dout @ v.mT - delta)
    p, ds = rounded(p), rounded(ds)
    if mutant == "p is rounded twice":
        p = rounded(rounded(p * sums) / sums)
    dq, dk, dv = scale * ds @ k, scale * ds.mT @ q, p.mT @ dout
    if mutant == "dq lacks a tile of keys":
        dq = dq - scale * ds[..., TILE] @ k[..., TILE, :]
    if mutant == "dq lacks a key":
        dq = dq - scale * ds[..., 30:31] @ k[..., 30:31, :]
    if mutant == "dk lacks a tile of queries":
        dk = dk - scale * ds[..., TILE, :].mT @ q[..., TILE, :]
    if mutant == "dv lacks the last query":
        dv = dv - p[..., -1:, :].mT @ dout[..., -1:, :]
    if mutant == "dq lacks the scale of one head":
        dq[:, 1] /= scale
    out, dq, dk, dv = (rounded(x).transpose(1, 2) for x in (out, dq, dk, dv))
    return {"out": out, "lse": lse[..., 0], "dq": dq, "dk": dk, "dv": dv}


def violated(inputs: tuple[Tensor, ...], mutant: str = "") -> set[str]:
    """The results of the model that have an element outside of the bound."""
    actual = model(inputs, mutant)
    expected = expected_with_bounds(*inputs)
    return {
        name
        for name in RESULTS
        if error_ratio(actual[name], expected.values[name], expected.bounds[name]).max() > 1
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(1, 1), (1, 300), (300, 1), (3, 3), (150, 200), (8, 3000)]
)
def test_a_correct_kernel_is_inside(seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> None:
    assert not violated(draw(seqlen_q, seqlen_k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mutant", "seqlen_q", "seqlen_k", "found_in"),
    [
        ("scores are rounded", 150, 200, {"lse"}),
        ("q is scaled by 1.004", 150, 200, {"lse"}),
        ("key at a tile's edge is dropped", 150, 200, {"out", "lse", "dk", "dv"}),
        ("key at a tile's edge is dropped", 8, 3000, {"lse", "dk", "dv"}),
        ("tile of keys is seen twice", 150, 200, {"out", "lse", "dk", "dv"}),
        ("tile of keys is seen twice", 8, 3000, {"lse", "dk", "dv"}),
        ("p is rounded twice", 300, 3, {"out"}),
        ("p is rounded twice", 1, 300, {"dv"}),
        ("lse of a row is off by 1e-3", 8, 3000, {"lse"}),
        ("sums are kept in 16 bits", 150, 200, {"lse"}),
        ("gradient of the LSE is ignored", 150, 200, {"dq", "dk"}),
        ("dq lacks a tile of keys", 150, 200, {"dq"}),
        ("dq lacks a tile of keys", 8, 1000, {"dq"}),
        ("dq lacks a key", 150, 200, {"dq"}),
        ("dk lacks a tile of queries", 200, 150, {"dk"}),
        ("dv lacks the last query", 150, 200, {"dv"}),
        ("dq lacks the scale of one head", 150, 200, {"dq"}),
    ],
)
def test_an_error_is_outside(
    mutant: str, seqlen_q: int, seqlen_k: int, found_in: set[str], dtype: torch.dtype
) -> None:
    assert violated(draw(seqlen_q, seqlen_k, dtype), mutant) >= found_in


@pytest.mark.parametrize("max_scores", [1, 100, 10**9])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window_size": (3, 1), "softmax_scale": -0.3}]
)
def test_values_are_those_of_the_reference(mask: dict[str, Any], max_scores: int) -> None:
    q, k, v, dout, dlse = draw(13, 7)
    q = torch.cat([q, torch.randn_like(q)], dim=2)
    dout, dlse = torch.cat([dout, dout], dim=2), torch.cat([dlse, dlse], dim=1)
    expected = expected_with_bounds(q, k, v, dout, dlse, max_scores=max_scores, **mask)
    whole = expected_with_bounds(q, k, v, dout, dlse, **mask)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    out, lse = attention_ref(*leaves, **mask)
    seen = lse.masked_fill(lse == -math.inf, 0.0)
    gradients = torch.autograd.grad((out, seen), leaves, (dout, dlse))
    for name, value in zip(RESULTS, (out, lse, *gradients), strict=True):
        torch.testing.assert_close(expected.values[name], value, rtol=1e-12, atol=1e-12)
    for name in RESULTS:
        torch.testing.assert_close(expected.bounds[name], whole.bounds[name], rtol=1e-9, atol=0)


RULES = [
    {"bias": "bhqk", "head_dim_v": 7},
    {"bias": "k", "causal": True, "bias_data": "holes"},
    {"bias": "hq", "mask": "bhqk", "density": 0.2},
    {"bias": "", "mask": "bk", "lengths": "qk"},
    {"block_mask": "hqk", "density": 0.4, "prefix": True, "window": (30, 2)},
    {"documents": "runs", "padding": "left", "lengths": "k", "seqlen_k": 131},
    {"varlen": True, "bias": "bqk", "head_dim_v": 5, "causal": True, "batch": 4},
    {"varlen": True, "lengths": "qk", "prefix": True, "window": (9, 0), "batch": 4},
    {"varlen": True, "lengths": "same", "seqlen_k": 131, "block_mask": "bhqk", "mask": "hk"},
    {"softcap": 1.5, "alibi": "bh", "sinks": "normal", "dropout": 0.3, "bias": "hk"},
    {"alibi": "h", "sinks": "holes", "mask": "bq", "density": 0.5, "lengths": "qk"},
    {"varlen": True, "alibi": "bh", "sinks": "large", "dropout": 0.5, "softcap": 9.0, "batch": 4},
]


@pytest.mark.parametrize("max_scores", [50_000, 10**9])
@pytest.mark.parametrize("fields", RULES, ids=str)
def test_values_of_a_case_are_those_of_the_reference(
    fields: dict[str, Any], max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"seqlen_q": 131, "seqlen_k": 140, "heads": 4, "dtype": "float64", "head_dim": 8}
    case = Case(**{**plain, **fields}, dlse=True, max_logit=True)
    inputs = make_inputs(case)
    defaults = {**expected_with_bounds.__kwdefaults__, "max_scores": max_scores}
    monkeypatch.setattr(expected_with_bounds, "__kwdefaults__", defaults)
    expected = expected_of(case, inputs, backward=True)
    given = {"attn_bias": inputs.bias, **inputs.terms}
    given = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    attention = attention_varlen_ref if case.varlen else attention_ref
    out, lse = attention(
        *leaves,
        softcap=case.softcap,
        dropout_p=case.dropout,
        kept=kept_of(case),
        **given,
        **case.mask_arguments,
        **inputs.rules,
    )
    leaves += given.values()
    exists = lse != -math.inf
    dlse = inputs.dlse.masked_fill(~exists, 0.0)
    dout = inputs.dout.nan_to_num(nan=0.0)
    gradients = torch.autograd.grad((out, lse.masked_fill(~exists, 0.0)), leaves, (dout, dlse))
    of_given = {"attn_bias": "dbias", "alibi_slopes": "dslopes", "sinks": "dsinks"}
    names = [*RESULTS, *(of_given[name] for name in given)]
    assert expected.values.keys() == {*names, "max_logit"}
    if not case.varlen:
        scores = attention_scores(
            *leaves[:2],
            attn_bias=given.get("attn_bias"),
            alibi_slopes=given.get("alibi_slopes"),
            softcap=case.softcap,
            **case.mask_arguments,
            **inputs.visibility,
        )
        names.append("max_logit")
        gradients = (*gradients, scores.amax(dim=(0, 2, 3)))
    for name, value in zip(names, (out, lse, *gradients), strict=True):
        torch.testing.assert_close(expected.values[name], value, rtol=1e-12, atol=1e-12)
        bound = expected.bounds[name]
        assert (bound >= 0).all()
        # Slopes are multiplied by distances of up to 140 and summed over all pairs.
        assert (bound < (1e-7 if name == "dslopes" else 1e-9)).all()


@pytest.mark.parametrize("terms", [10, 100, 3000])
def test_a_sum_of_equal_terms_is_inside(terms: int) -> None:
    term = torch.rand(10_000)
    total = torch.zeros_like(term)
    for _ in range(terms):
        total += term
    exact = terms * term.double()
    roundoffs = ((total - exact).abs() / exact).max().item() * 2**24
    allowed = CONSTANTS.of_sum(torch.tensor(terms).double()).item()
    assert roundoffs < allowed
    if terms > 1000:  # as if roundings were independent
        assert roundoffs > CONSTANTS.sum + CONSTANTS.sum_per_root * math.sqrt(terms)


@pytest.mark.parametrize(("size", "is_inside"), [(0.99, True), (1.5, False)])
def test_a_subnormal_sum_of_dq_may_be_flushed(size: float, is_inside: bool) -> None:
    smallest_normal, scale = 2.0**-126, 8.0
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    # dS of a key that is seen alone is dLSE.
    dlse = torch.full((1, 1, 1), 16 * size * smallest_normal)
    inputs = (one, one / 16, one, torch.zeros_like(one), dlse)
    expected = expected_with_bounds(*inputs, softmax_scale=scale)
    dq, bound = expected.values["dq"], expected.bounds["dq"]
    torch.testing.assert_close(dq.item(), scale * size * smallest_normal, rtol=1e-6, atol=0)
    assert (error_ratio(torch.zeros_like(dq), dq, bound).item() < 1) == is_inside


def test_error_ratio() -> None:
    nan, inf = math.nan, math.inf
    actual = torch.tensor([1.0, 2.0, -inf, nan, inf, 0.0, 1.0, 1.0])
    expected = torch.tensor([1.5, 2.0, -inf, 1.0, 1.0, nan, 1.0, 2.0]).double()
    bound = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, nan, 0.0]).double()
    ratio = error_ratio(actual, expected, bound)
    assert ratio.tolist() == [0.5, 0.0, 0.0, inf, inf, inf, 0.0, inf]


def test_what_a_dtype_cannot_hold_may_be_infinite() -> None:
    inf = math.inf
    actual = torch.tensor([inf, inf, inf, -inf, -inf, 65504.0], dtype=torch.float16)
    expected = torch.tensor([7e4, 65000.0, 65000.0, -7e4, 7e4, 7e4]).double()
    bound = torch.tensor([1.0, 600.0, 400.0, 1.0, 1.0, 1.0]).double()
    ratio = error_ratio(actual, expected, bound)
    assert ratio.tolist() == [0.0, 0.0, inf, 0.0, inf, 4496.0]


def test_the_calibration_writes_its_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    from tests import calibrate_error_bound

    out = tmp_path / "ratios.json"
    arguments = ["--device=cpu", "--problems=18", f"--out={out}"]
    assert calibrate_error_bound.main(arguments) == 0
    written = json.loads(out.read_text())
    assert written["problems"] == 18
    assert written["constants_in_force"] == dataclasses.asdict(compare.CONSTANTS)
    assert 0 < written["largest_ratio"] < 1
    assert {r["result"] for r in written["results"]} == {*RESULTS, "dbias"}
    assert all(r["p50"] <= r["p99"] <= r["max"] + 1e-3 for r in written["results"])
    assert all(0 <= r["max"] < 1 and r["elements"] > 0 for r in written["constants"])
    assert written["rmse"]
    assert "bfloat16" in capsys.readouterr().out

    too_small = compare.Constants(operand=0, result=0.1)
    monkeypatch.setattr(calibrate_error_bound, "CONSTANTS", too_small)
    assert calibrate_error_bound.main(arguments) == 1
    assert json.loads(out.read_text())["largest_ratio"] >= 1
