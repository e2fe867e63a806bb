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
    "SymInt window_right, bool deterministic, bool allow_tf32) -> (Tensor out, Tensor softmax_lse)"
)
BWD_SCHEMA = (
    "flash_attn_cuda::bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, float? softmax_scale, SymInt window_left, SymInt window_right, "
    "bool deterministic, bool allow_tf32) -> (Tensor dq, Tensor dk, Tensor dv)"
)
GENERAL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? attn_bias, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? block_mask, "
    "Tensor? document_ids, Tensor? prefix_lens, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? rng_state, float softcap, float dropout_p, float? softmax_scale"
)


def test_schema() -> None:
    ops = torch.ops.flash_attn_cuda
    fwd_general = FWD_SCHEMA.replace("float? softmax_scale", GENERAL)
    bwd_general = BWD_SCHEMA.replace("float? softmax_scale", GENERAL)
    fwd_general = fwd_general.replace("allow_tf32)", "allow_tf32, bool needs_max_logit)")
    fwd_general = fwd_general.replace("softmax_lse)", "softmax_lse, Tensor max_logit)")
    needs = "bool needs_dbias, bool needs_dslopes, bool needs_dsinks"
    bwd_general = bwd_general.replace("allow_tf32)", f"allow_tf32, {needs})")
    gradients = "Tensor dbias, Tensor dslopes, Tensor dsinks"
    bwd_general = bwd_general.replace("Tensor dv)", f"Tensor dv, {gradients})")
    for suffix in ("_general", "_general_eager"):
        fwd, bwd = getattr(ops, f"fwd{suffix}"), getattr(ops, f"bwd{suffix}")
        assert str(fwd.default._schema) == fwd_general.replace("::fwd", f"::fwd{suffix}")
        assert str(bwd.default._schema) == bwd_general.replace("::bwd", f"::bwd{suffix}")
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


# cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, attn_bias, attn_mask, key_padding_mask,
# block_mask, document_ids, prefix_lens; then alibi_slopes, sinks, rng_state, softcap, dropout_p. Of
# 2 sequences of 40 rows.
def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


STATE = torch.tensor([5, 2**40])
TERMS = {
    "softcap": (None, None, None, 2.0, 0.0),
    "slopes": (torch.rand(2), None, None, 0.0, 0.0),
    "all terms": (torch.rand(2, 2), torch.randn(2), STATE, 3.0, 0.25),
    "packed terms": (torch.rand(2, 2), torch.randn(2), STATE, 3.0, 0.25),
}
GENERAL_TENSORS = {
    "plain": (None,) * 10,
    "lengths": (None, None, _int32(30, 0), _int32(40, 7), *(None,) * 6),
    "bias": (*(None,) * 4, torch.randn(2, 40, 40), *(None,) * 5),
    "masks": (
        *(None,) * 5,
        torch.ones(40, 40, dtype=torch.bool).tril(),
        torch.ones(2, 40, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
        torch.zeros(2, 40, dtype=torch.int32),
        _int32(3, 0),
    ),
    "packed": (_int32(0, 13, 40), _int32(0, 0, 40), *(None,) * 8),
    "packed bias": (
        *(_int32(0, 13, 40), _int32(0, 20, 40), None, _int32(20, 3)),
        *(torch.randn(2, 1, 40, 1), *(None,) * 4, _int32(5, 6)),
    ),
    **dict.fromkeys(("softcap", "slopes", "all terms"), (None,) * 10),
    "packed terms": (_int32(0, 13, 40), _int32(0, 0, 40), *(None,) * 8),
}


def _general_arguments(name: str, device: str) -> tuple[list[torch.Tensor], list[object]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = 1 if name.startswith("packed") else 2
    qkv = [
        torch.randn(batch, 40, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
        for head_dim in (16, 16, 24)
    ]
    *terms, softcap, dropout_p = TERMS.get(name, (None, None, None, 0.0, 0.0))
    tensors = [None if x is None else x.to(device) for x in (*GENERAL_TENSORS[name], *terms)]
    for index in (4, 10, 11):
        if tensors[index] is not None:
            tensors[index] = tensors[index].clone().requires_grad_()
    return qkv, [*tensors, softcap, dropout_p, 0.3, -1, 5, True, False]


@pytest.mark.parametrize("name", GENERAL_TENSORS)
def test_fwd_general(device: str, name: str) -> None:
    qkv, options = _general_arguments(name, device)
    for needs_max_logit in [False, *([True] if name in TERMS else [])]:
        arguments = (*qkv, *options, needs_max_logit)
        torch.library.opcheck(torch.ops.flash_attn_cuda.fwd_general.default, arguments)


def test_dropout_mask(device: str) -> None:
    arguments = (STATE.to(device), 0.3, 2, 3, 40, 50)
    torch.library.opcheck(torch.ops.flash_attn_cuda.dropout_mask.default, arguments)


@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize("name", GENERAL_TENSORS)
def test_bwd_general(device: str, name: str, needs_gradients: bool) -> None:
    qkv, options = _general_arguments(name, device)
    out, lse, _ = torch.ops.flash_attn_cuda.fwd_general(*qkv, *options, False)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *qkv, out, lse, *options)
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    needs = 3 * [needs_gradients]
    torch.library.opcheck(torch.ops.flash_attn_cuda.bwd_general.default, (*arguments, *needs))


def _options(case: Case) -> tuple[float, int, int, bool, bool]:
    left, right = case.window
    return case.scale, left, 0 if case.causal else right, case.deterministic, False


def _bwd_arguments(case: Case) -> tuple[object, ...]:
    inputs: Inputs = make_inputs(case)
    out, lse = torch.ops.flash_attn_cuda.fwd(inputs.q, inputs.k, inputs.v, *_options(case))
    dlse = inputs.dlse
    return inputs.dout, dlse, inputs.q, inputs.k, inputs.v, out, lse, *_options(case)
