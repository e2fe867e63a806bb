# SPDX-License-Identifier: BSD-3-Clause
"""torch.library.opcheck: schema, autograd registration, fake kernels and AOT dispatch agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flash_attn_cuda  # noqa: F401  (registers the operators)
from tests.support.cases import Case, Inputs, make_inputs

CASES = [
    Case(seqlen_q=17, seqlen_k=17),
    Case(seqlen_q=65, seqlen_k=33, causal=True),
    Case(seqlen_q=33, seqlen_k=65, window=(7, 3), dtype="bfloat16"),
    Case(heads=4, heads_kv=2, dtype="float16"),
    Case(dtype="float64", head_dim=5),
    Case(layout="bhsd"),
    Case(layout="sliced"),
    Case(layout="strided_dim"),
    Case(layout="expanded_heads"),
    Case(seqlen_q=0),
    Case(seqlen_k=0),
    Case(batch=0),
    Case(batch=1, seqlen_q=1, dtype="bfloat16"),
    Case(deterministic=True),
]
FWD_SCHEMA = (
    "flash_attn_cuda::fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale, SymInt window_left, "
    "SymInt window_right, bool deterministic) -> (Tensor out, Tensor softmax_lse)"
)
BWD_SCHEMA = (
    "flash_attn_cuda::bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, float? softmax_scale, SymInt window_left, SymInt window_right, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def test_schema() -> None:
    ops = torch.ops.flash_attn_cuda
    assert str(ops.fwd.default._schema) == FWD_SCHEMA
    assert str(ops.fwd_eager.default._schema) == FWD_SCHEMA.replace("::fwd", "::fwd_eager")
    assert str(ops.bwd.default._schema) == BWD_SCHEMA
    assert str(ops.bwd_eager.default._schema) == BWD_SCHEMA.replace("::bwd", "::bwd_eager")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fwd(device: str, case: Case) -> None:
    case = case.on(device)
    inputs = make_inputs(case)
    qkv = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    torch.library.opcheck(torch.ops.flash_attn_cuda.fwd.default, (*qkv, *_options(case)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fwd_eager(device: str, case: Case) -> None:
    case = case.on(device)
    inputs = make_inputs(case)
    arguments = (inputs.q, inputs.k, inputs.v, *_options(case))
    torch.library.opcheck(torch.ops.flash_attn_cuda.fwd_eager.default, arguments)


@pytest.mark.parametrize("dlse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bwd(device: str, case: Case, dlse: bool) -> None:
    case = replace(case.on(device), dlse=dlse)
    torch.library.opcheck(torch.ops.flash_attn_cuda.bwd.default, _bwd_arguments(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bwd_eager(device: str, case: Case) -> None:
    arguments = _bwd_arguments(case.on(device))
    torch.library.opcheck(torch.ops.flash_attn_cuda.bwd_eager.default, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_have_the_strides_of_real_ones(device: str, case: Case) -> None:
    case = case.on(device)
    inputs = make_inputs(case)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_qkv = [mode.from_tensor(x) for x in (inputs.q, inputs.k, inputs.v)]
        fake = torch.ops.flash_attn_cuda.fwd(*fake_qkv, *_options(case))
    real = torch.ops.flash_attn_cuda.fwd(inputs.q, inputs.k, inputs.v, *_options(case))
    for traced, computed in zip(fake, real, strict=True):
        assert traced.shape == computed.shape
        assert traced.stride() == computed.stride()
        assert traced.dtype == computed.dtype


def _options(case: Case) -> tuple[float, int, int, bool]:
    left, right = case.window
    return case.scale, left, 0 if case.causal else right, case.deterministic


def _bwd_arguments(case: Case) -> tuple[object, ...]:
    inputs: Inputs = make_inputs(case)
    out, lse = torch.ops.flash_attn_cuda.fwd(inputs.q, inputs.k, inputs.v, *_options(case))
    dlse = inputs.dlse
    return inputs.dout, dlse, inputs.q, inputs.k, inputs.v, out, lse, *_options(case)
