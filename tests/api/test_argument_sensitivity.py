# SPDX-License-Identifier: BSD-3-Clause
"""No argument is lost between Python and the kernel: each one changes every result it should."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_cuda import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.support.arguments import LATER

# Each changes the output, the LSE and all gradients.
SENSITIVE: dict[str, dict[str, object]] = {
    "softmax_scale": {"softmax_scale": 0.5},
    "causal": {"causal": True},
    "window_size left": {"window_size": (3, -1)},
    "window_size right": {"window_size": (-1, 3)},
}


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Each changes all of these too; what it is given beside, so that there is something to change.
RULES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "attn_bias": ({}, {"attn_bias": torch.linspace(-3, 3, 1600).view(40, 40).sin()}),
    "attn_mask": ({}, {"attn_mask": torch.arange(1600).view(1, 1, 40, 40) % 3 != 0}),
    "key_padding_mask": ({}, {"key_padding_mask": torch.arange(80).view(2, 40) % 40 < 25}),
    "seqlens_q": ({}, {"seqlens_q": _int32(30, 20)}),
    "seqlens_k": ({}, {"seqlens_k": _int32(30, 20)}),
    "document_ids": ({}, {"document_ids": (torch.arange(80).view(2, 40) // 13).int()}),
    "prefix_lens": ({"causal": True}, {"prefix_lens": _int32(20, 30)}),
    "block_mask": ({}, {"block_mask": torch.tensor([True, False]).view(2, 1, 1, 1)}),
    "softcap": ({}, {"softcap": 0.5}),
    "alibi_slopes": ({}, {"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "sinks": ({}, {"sinks": torch.tensor([3.0, 4.0])}),
}
PACKED_RULES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "cu_seqlens_q": ({}, {"cu_seqlens_q": _int32(0, 30, 80)}),
    "cu_seqlens_k": ({}, {"cu_seqlens_k": _int32(0, 30, 80)}),
    "seqused_q": ({}, {"seqused_q": _int32(30, 20)}),
    "seqused_k": ({}, {"seqused_k": _int32(30, 20)}),
    "prefix_lens": RULES["prefix_lens"],
    "attn_bias": RULES["attn_bias"],
    "attn_mask": RULES["attn_mask"],
    "block_mask": RULES["block_mask"],
    **{name: RULES[name] for name in ("softcap", "alibi_slopes", "sinks")},
}
# Changes all but the LSE, by what the generator draws.
DROPOUT = {"dropout_p", "generator"}
# Change only what is returned, or the order of additions; tested below.
NEUTRAL = {"deterministic", "return_attn_probs", "return_lse", "return_max_logit"}
# flash-attn's callers pass them; nothing needs them.
IGNORED = {"max_seqlen_q", "max_seqlen_k"}
NAMES = ("out", "lse", "dq", "dk", "dv")


def _qkv(device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        torch.randn(2, 40, 2, 16, device=device, dtype=dtype).requires_grad_() for _ in range(3)
    ]


def _results(qkv: list[Tensor], **arguments: object) -> dict[str, Tensor]:
    out, lse = flash_attn_func(*qkv, return_lse=True, **arguments)
    loss = out.square().sum() + lse.sum()
    return dict(zip(NAMES, (out, lse, *torch.autograd.grad(loss, qkv)), strict=True))


@pytest.mark.parametrize("argument", SENSITIVE)
def test_argument_changes_every_result(device: str, argument: str) -> None:
    qkv = _qkv(device)
    default = _results(qkv)
    changed = _results(qkv, **SENSITIVE[argument])
    for name in NAMES:
        assert not torch.allclose(changed[name], default[name], rtol=1e-2, atol=1e-3), name


def _on(device: str, arguments: dict[str, object]) -> dict[str, object]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _assert_all_differ(results: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name in NAMES:
        assert not torch.allclose(results[name], others[name], rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("argument", RULES)
def test_a_rule_changes_every_result(device: str, argument: str) -> None:
    beside, rule = (_on(device, part) for part in RULES[argument])
    qkv = _qkv(device)
    _assert_all_differ(_results(qkv, **beside, **rule), _results(qkv, **beside))


def _packed_results(qkv: list[Tensor], **arguments: object) -> dict[str, Tensor]:
    sequences = {f"cu_seqlens_{side}": _int32(0, 40, 80).to(qkv[0].device) for side in "qk"}
    packed = [x.flatten(0, 1) for x in qkv]
    out, lse = flash_attn_varlen_func(*packed, **(sequences | arguments), return_lse=True)
    loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
    return dict(zip(NAMES, (out, lse, *torch.autograd.grad(loss, qkv)), strict=True))


@pytest.mark.parametrize("argument", PACKED_RULES)
def test_a_rule_changes_every_result_of_packed_sequences(device: str, argument: str) -> None:
    beside, rule = (_on(device, part) for part in PACKED_RULES[argument])
    qkv = _qkv(device)
    _assert_all_differ(_packed_results(qkv, **beside, **rule), _packed_results(qkv, **beside))


@pytest.mark.parametrize("argument", SENSITIVE)
def test_arguments_change_every_result_of_packed_sequences(device: str, argument: str) -> None:
    qkv = _qkv(device)
    _assert_all_differ(_packed_results(qkv, **SENSITIVE[argument]), _packed_results(qkv))


def test_lengths_that_nothing_needs_change_nothing(device: str) -> None:
    qkv = _qkv(device)
    expected = _packed_results(qkv, deterministic=True)
    for length in (40, 7, torch.tensor(40, device=device)):
        results = _packed_results(qkv, deterministic=True, max_seqlen_q=length, max_seqlen_k=length)
        assert all(torch.equal(results[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_each_tensor_changes_the_output(device: str, changed: int) -> None:
    qkv = _qkv(device)
    default = _results(qkv)
    qkv[changed] = (2 * qkv[changed]).detach().requires_grad_()
    results = _results(qkv)
    for name in ("out", "dq", "dk"):
        assert not torch.allclose(results[name], default[name], rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("part", ["dout", "dlse"])
def test_each_incoming_gradient_changes_the_gradients(device: str, part: str) -> None:
    qkv = _qkv(device)
    results = flash_attn_func(*qkv, return_lse=True)
    gradients = [torch.randn_like(x) for x in results]
    once = torch.autograd.grad(results, qkv, gradients, retain_graph=True)
    gradients[("dout", "dlse").index(part)].mul_(3)
    again = torch.autograd.grad(results, qkv, gradients)
    for index in (0, 1):  # the gradient of v does not depend on dlse
        assert not torch.allclose(once[index], again[index], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("argument", SENSITIVE)
def test_packed_forms_pass_their_arguments_on(device: str, argument: str) -> None:
    q, k, v = (x.detach() for x in _qkv(device))
    options = SENSITIVE[argument]
    expected = flash_attn_func(q, k, v, return_lse=True, **options)
    for packed in (
        flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), return_lse=True, **options),
        flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), return_lse=True, **options),
    ):
        assert all(map(torch.equal, packed, expected))


@pytest.mark.parametrize("argument", RULES)
def test_packed_forms_pass_their_rules_on(device: str, argument: str) -> None:
    q, k, v = (x.detach() for x in _qkv(device))
    options = {key: value for part in RULES[argument] for key, value in _on(device, part).items()}
    expected = flash_attn_func(q, k, v, return_lse=True, **options)
    for packed in (
        flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), return_lse=True, **options),
        flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), return_lse=True, **options),
    ):
        assert all(map(torch.equal, packed, expected))


@pytest.mark.parametrize("argument", [*SENSITIVE, *PACKED_RULES])
def test_packed_forms_of_packed_sequences_pass_on(device: str, argument: str) -> None:
    q, k, v = (x.detach().flatten(0, 1) for x in _qkv(device))
    beside, rule = PACKED_RULES.get(argument, ({}, SENSITIVE.get(argument, {})))
    options = _on(device, {"cu_seqlens_q": _int32(0, 40, 80), "cu_seqlens_k": _int32(0, 40, 80)})
    options |= _on(device, beside) | _on(device, rule)
    expected = flash_attn_varlen_func(q, k, v, return_lse=True, **options)
    kv = torch.stack([k, v], dim=1)
    packed = flash_attn_varlen_kvpacked_func(q, kv, return_lse=True, **options)
    assert all(map(torch.equal, packed, expected))
    if argument in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        return  # queries and keys have the same there
    cu_seqlens = options.pop("cu_seqlens_q")
    del options["cu_seqlens_k"]
    qkv = torch.stack([q, k, v], dim=1)
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, return_lse=True, **options)
    assert all(map(torch.equal, packed, expected))


def test_seqused_of_packed_qkv_is_of_queries_and_keys(device: str) -> None:
    q, k, v = (x.detach().flatten(0, 1) for x in _qkv(device))
    cu_seqlens, used = _int32(0, 40, 80).to(device), _int32(30, 20).to(device)
    expected = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, seqused_q=used, seqused_k=used
    )
    qkv = torch.stack([q, k, v], dim=1)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, seqused=used), expected)


class _Record(TorchDispatchMode):
    """What the operators of the package are told of determinism."""

    def __init__(self) -> None:
        super().__init__()
        self.deterministic: list[object] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        if func.namespace == "flash_attn_cuda":
            self.deterministic.append(args[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", [False, True])
@pytest.mark.parametrize("argument", [False, True])
def test_deterministic_reaches_both_passes(argument: bool, setting: bool) -> None:
    qkv = _qkv("cpu")
    torch.use_deterministic_algorithms(setting)
    try:
        with _Record() as record:
            flash_attn_func(*qkv, deterministic=argument).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert record.deterministic == 2 * [argument or setting]


def test_torchs_setting_counts_when_gradients_are_computed() -> None:
    with _Record() as record:
        loss = flash_attn_func(*_qkv("cpu")).sum()
        torch.use_deterministic_algorithms(True)
        try:
            loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert record.deterministic == [False, True]


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_changes_all_but_the_lse(device: str, packed: bool) -> None:
    qkv = _qkv(device)
    results_of = _packed_results if packed else _results

    def results(p: float, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return results_of(qkv, dropout_p=p, generator=generator, deterministic=True)

    first = results(0.4, 1)
    for other in (results(0.0, 1), results(0.2, 1), results(0.4, 2)):
        for name in NAMES:
            same = torch.allclose(first[name], other[name], rtol=1e-2, atol=1e-3)
            assert same == (name == "lse"), name
    again = results(0.4, 1)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_packed_forms_pass_dropout_and_what_is_returned_on(device: str) -> None:
    q, k, v = (x.detach() for x in _qkv(device))

    def options() -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(4)
        return {"dropout_p": 0.4, "generator": generator, "return_max_logit": True}

    for wanted in ({"return_lse": True}, {"return_attn_probs": True}):
        expected = flash_attn_func(q, k, v, **options(), **wanted)
        for packed in (
            flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), **options(), **wanted),
            flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), **options(), **wanted),
        ):
            assert len(packed) == len(expected)
            assert all(map(torch.equal, packed, expected))
        of_q, of_k, of_v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens = _int32(0, 40, 80).to(device)
        expected = flash_attn_varlen_func(
            of_q, of_k, of_v, cu_seqlens, cu_seqlens, **options(), **wanted
        )
        of_kv, of_qkv = torch.stack([of_k, of_v], dim=1), torch.stack([of_q, of_k, of_v], dim=1)
        for packed in (
            flash_attn_varlen_qkvpacked_func(of_qkv, cu_seqlens, **options(), **wanted),
            flash_attn_varlen_kvpacked_func(
                of_q, of_kv, cu_seqlens, cu_seqlens, **options(), **wanted
            ),
        ):
            assert len(packed) == len(expected)
            assert all(map(torch.equal, packed, expected))


def test_results_follow_the_return_arguments(device: str) -> None:
    qkv = _qkv(device)
    out = flash_attn_func(*qkv)
    assert isinstance(out, Tensor)
    with_lse = flash_attn_func(*qkv, return_lse=True)
    assert [x.shape for x in with_lse] == [(2, 40, 2, 16), (2, 2, 40)]
    probabilities = flash_attn_func(*qkv, return_attn_probs=True)
    assert [x.shape for x in probabilities] == [(2, 40, 2, 16), (2, 2, 40), (0,)]
    for result in (with_lse, probabilities):
        assert torch.equal(result[0], out)
        assert torch.equal(result[1], with_lse[1])


@pytest.mark.parametrize(
    ("function", "rules"), [(flash_attn_func, RULES), (flash_attn_varlen_func, PACKED_RULES)]
)
def test_every_argument_is_covered(function: Any, rules: dict[str, object]) -> None:
    """An argument added to the signature must be added here, or refused in test_errors."""
    arguments = set(inspect.signature(function).parameters) - {"q", "k", "v"}
    sensitive = {name.split()[0] for name in SENSITIVE}
    known = sensitive | set(rules) | NEUTRAL | DROPOUT | set(LATER)
    if function is flash_attn_varlen_func:
        known |= IGNORED
        assert arguments == known
    else:
        assert arguments == known - {"block_table"}
