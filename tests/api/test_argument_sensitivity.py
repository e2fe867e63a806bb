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
    "attn_bias": {"attn_bias": torch.linspace(0, 2, 40)},
    "attn_mask": {"attn_mask": torch.arange(40) % 3 > 0},
    "key_padding_mask": {"key_padding_mask": torch.arange(40).expand(2, 40) < 25},
    "seqlens_q": {"seqlens_q": torch.tensor([40, 30], dtype=torch.int32)},
    "seqlens_k": {"seqlens_k": torch.tensor([40, 25], dtype=torch.int32)},
    "document_ids": {"document_ids": torch.arange(80, dtype=torch.int32).view(2, 40) // 13},
    "prefix_lens": {"prefix_lens": torch.tensor([35, 12], dtype=torch.int32)},
    "block_mask": {"block_mask": torch.tensor([[[True]], [[False]]])},
}
# What an argument needs to have an effect, where that is not the default.
BESIDE: dict[str, dict[str, object]] = {"prefix_lens": {"causal": True}}
# Of packed sequences: what they do not take, what has another name, and what divides them.
PADDED_ONLY = {"key_padding_mask", "document_ids"}
USED = {"seqlens_q": "seqused_q", "seqlens_k": "seqused_k"}
DIVIDING = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
# Change only what is returned, or the order of additions; tested below.
NEUTRAL = {"deterministic", "return_attn_probs", "return_lse"}
NAMES = ("out", "lse", "dq", "dk", "dv")


def _qkv(device: str) -> list[Tensor]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [
        torch.randn(2, 40, 2, 16, device=device, dtype=dtype).requires_grad_() for _ in range(3)
    ]


def _on(device: torch.device, arguments: dict[str, object]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _results(qkv: list[Tensor], **arguments: object) -> dict[str, Tensor]:
    out, lse = flash_attn_func(*qkv, return_lse=True, **_on(qkv[0].device, arguments))
    loss = out.square().sum() + lse.nan_to_num(neginf=0.0).sum()
    return dict(zip(NAMES, (out, lse, *torch.autograd.grad(loss, qkv)), strict=True))


@pytest.mark.parametrize("argument", SENSITIVE)
def test_argument_changes_every_result(device: str, argument: str) -> None:
    qkv = _qkv(device)
    beside = BESIDE.get(argument, {})
    default = _results(qkv, **beside)
    changed = _results(qkv, **beside, **SENSITIVE[argument])
    for name in NAMES:
        assert not torch.allclose(changed[name], default[name], rtol=1e-2, atol=1e-3), name


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
    options = _on(q.device, BESIDE.get(argument, {}) | SENSITIVE[argument])
    expected = flash_attn_func(q, k, v, return_lse=True, **options)
    for packed in (
        flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), return_lse=True, **options),
        flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), return_lse=True, **options),
    ):
        assert all(map(torch.equal, packed, expected))


@pytest.mark.parametrize("argument", [name for name in SENSITIVE if name not in PADDED_ONLY])
def test_packed_sequences_pass_their_arguments_on(device: str, argument: str) -> None:
    q, k, v = (x.detach() for x in _qkv(device))
    options = _on(q.device, BESIDE.get(argument, {}) | SENSITIVE[argument])
    out, lse = flash_attn_func(q, k, v, return_lse=True, **options)
    expected = (out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    options = {USED.get(name, name): value for name, value in options.items()}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    kv = torch.stack([k, v], dim=1)
    packed = [
        flash_attn_varlen_func(q, k, v, *2 * [cu_seqlens], return_lse=True, **options),
        flash_attn_varlen_kvpacked_func(q, kv, *2 * [cu_seqlens], return_lse=True, **options),
    ]
    if argument not in USED:
        qkv = torch.stack([q, k, v], dim=1)
        packed.append(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, return_lse=True, **options))
    for results in packed:
        assert all(map(torch.equal, results, expected))


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
            self.deterministic.append(args[-1])
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


def test_every_argument_is_covered() -> None:
    """An argument added to the signature must be added here, or refused in test_errors."""
    arguments = set(inspect.signature(flash_attn_func).parameters) - {"q", "k", "v"}
    sensitive = {name.split()[0] for name in SENSITIVE}
    assert arguments == sensitive | NEUTRAL | set(LATER)
    arguments = set(inspect.signature(flash_attn_varlen_func).parameters) - {"q", "k", "v"}
    sensitive = {USED.get(name, name) for name in sensitive - PADDED_ONLY}
    assert arguments == sensitive | NEUTRAL | set(LATER) | DIVIDING | {"block_table"}
