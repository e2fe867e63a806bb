# SPDX-License-Identifier: BSD-3-Clause
"""torch's attention on our kernels, against torch's math backend, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda import disable_sdpa, enable_sdpa, flash_attn_func, lowlevel, sdpa
from tests.support.torch_attention import (
    LAYOUTS,
    LENGTHS,
    TOLERANCES,
    compare,
    make_qkv,
    math_attention,
)

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("torch 2.11 or newer is needed", allow_module_level=True)
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

aten = torch.ops.aten
Step = Callable[..., Tensor]


def _mask(kind: str, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "pairs":
        return torch.rand(seqlen_q, seqlen_k) < 0.7
    if kind == "keys":
        return torch.rand(2, 1, 1, seqlen_k) < 0.7
    if kind == "bias":
        return torch.randn(2, 4, seqlen_q, seqlen_k, dtype=dtype)
    mask = torch.zeros(2, 1, seqlen_q, seqlen_k, dtype=dtype)  # as transformers writes it
    mask[0, :, :, 2:] = torch.finfo(dtype).min
    mask[1, :, 1] = torch.finfo(dtype).min
    return mask


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("kind", ["none", "pairs", "keys", "bias", "smallest"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masks_on_the_cpu(
    calls: list[str], dtype: torch.dtype, lengths: tuple[int, int], kind: str
) -> None:
    q, k, v = make_qkv("cpu", *lengths, dtype=dtype)
    mask = _mask(kind, *lengths, dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert calls == ["forward"]
    if kind in ("pairs", "keys"):  # the math backend has NaN as gradients of rows without a key
        mask = mask | ~mask.any(-1, keepdim=True)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    expected = math_attention(q, k, v, mask, scale=0.3)
    if kind == "smallest":  # whose hidden row has no gradient to rely on in torch's kernel either
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        others = (mask == 0).any(-1, keepdim=True)
        out, expected = out * others, expected * others
    compare(out, expected, (q, k, v))
    assert calls[-1] == "backward"


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_on_the_cpu_starts_at_the_top_left(
    calls: list[str], lengths: tuple[int, int], layout: str, heads_kv: int
) -> None:
    q, k, v = make_qkv("cpu", *lengths, heads_kv, layout)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads_kv != 4)
    assert calls == ["forward"]
    compare(out, math_attention(q, k, v, causal=True), (q, k, v))
    assert calls == ["forward", "backward"]


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_and_a_mask_in_the_operator_of_the_cpu(lengths: tuple[int, int]) -> None:
    q, k, v = make_qkv("cpu", *lengths)
    bias = torch.randn(*lengths)
    out, _ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, attn_mask=bias)
    seen = torch.ones(lengths, dtype=torch.bool).tril()
    compare(out, math_attention(q, k, v, bias.masked_fill(~seen, -torch.inf)), (q, k, v))


@pytest.mark.usefixtures("sdpa_enabled")
def test_a_query_without_keys_is_zero() -> None:
    q, k, v = make_qkv("cpu")
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dout = torch.randn_like(out)
    dq, *others = torch.autograd.grad(out, (q, k, v), dout)
    assert not out[:, :, 3].any()
    assert not dq[:, :, 3].any()
    dout[:, :, 3] = 0
    expected = torch.autograd.grad(math_attention(q, k, v), (q, k, v), dout.double())
    for found, wanted in zip((dq, *others), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _attention_layer(options: dict[str, Any]) -> Step:
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True, **options)
    return lambda x: layer(x, x, x, need_weights=False)[0]


def _encoder_layer(options: dict[str, Any]) -> Step:
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, 0.0, batch_first=True, **options)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(24, **options)
    return lambda x: layer(x, src_mask=causal, is_causal=True)


@pytest.mark.parametrize("make", [_attention_layer, _encoder_layer])
def test_modules(device: str, calls: list[str], make: Callable[[dict[str, Any]], Step]) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    step = make({"device": device, "dtype": dtype})
    x = torch.randn(2, 24, 64, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = step(x)
    (wanted,) = torch.autograd.grad(expected, x, dout)
    assert calls == []
    with enable_sdpa():
        out = step(x)
        (found,) = torch.autograd.grad(out, x, dout)
    assert calls == ["forward", "backward"]
    tolerance = 2e-2 if device == "cuda" else 2e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 2 * scaled_dot_product_attention(1.5 * q, k, v, is_causal=True)


def _with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], device=q.device, dtype=torch.bool).tril(3)
    return scaled_dot_product_attention(1.5 * q, k, v, attn_mask=mask) + 1


def _with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 2 * aten._scaled_dot_product_flash_attention(1.5 * q, k, v, 0.25, True)[0]


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("device", "step"),
    [
        ("cpu", _plain),
        ("cpu", _with_mask),
        ("cpu", _with_dropout),
        pytest.param("cuda", _plain, marks=pytest.mark.gpu),
        pytest.param("cuda", _with_dropout, marks=pytest.mark.gpu),
    ],
)
def test_compiled_equals_eager(device: str, calls: list[str], step: Step, layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = make_qkv(device, 20, 20, 4, layout)
    torch.use_deterministic_algorithms(True)
    results = []
    try:
        for run in (step, compiled):
            torch.manual_seed(0)
            out = run(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *results))
    assert [x.stride() for x in results[0]] == [x.stride() for x in results[1]]
    assert calls == 2 * ["forward", "backward"]


@pytest.mark.slow
@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_accepts_the_strides(device: str, calls: list[str], layout: str) -> None:
    torch._dynamo.reset()
    inputs = make_qkv(device, 20, 20, 4, layout)
    out = torch.compile(_plain, fullgraph=True)(*inputs)
    compare(out, 2 * math_attention(1.5 * inputs[0].double(), *inputs[1:], causal=True), inputs)
    assert calls == ["forward", "backward"]


@pytest.mark.gpu
@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("backends", [None, SDPBackend.FLASH_ATTENTION], ids=["default", "flash"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.1}, {"enable_gqa": True}, {"dropout_p": 0.25}],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 128, 256])
def test_sdpa_on_cuda(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    options: dict[str, Any],
    backends: SDPBackend | None,
) -> None:
    states = []
    forward = lowlevel.forward

    def noting_the_state(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        results = forward(*args, **kwargs)
        states.extend(results[2:])
        return results

    monkeypatch.setattr(lowlevel, "forward", noting_the_state)
    heads_kv = 2 if "enable_gqa" in options else 4
    q, k, v = (
        torch.randn(2, heads, 300, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (4, heads_kv, heads_kv)
    )
    if backends is None:
        out = scaled_dot_product_attention(q, k, v, **options)
    else:
        with sdpa_kernel(backends):
            out = scaled_dot_product_attention(q, k, v, **options)
    dropout_p = options.get("dropout_p", 0.0)
    kept = lowlevel.dropout_mask(states[0], dropout_p, 2, 4, 300, 300) if dropout_p else None
    expected = math_attention(
        *(q, k, v, None, options.get("is_causal", False), options.get("scale")),
        *(dropout_p, kept),
    )
    compare(out, expected, (q, k, v))
    assert calls == ["forward", "backward"]


@pytest.mark.gpu
@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("lengths", [(20, 33), (33, 20)], ids=str)
def test_causal_with_unequal_lengths_on_cuda(calls: list[str], lengths: tuple[int, int]) -> None:
    """From the top left, which torch does itself, and to the bottom right."""
    q, k, v = make_qkv("cuda", *lengths)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert calls == []
    compare(out, math_attention(q, k, v, causal=True), (q, k, v))
    first = max(lengths[0] - lengths[1], 0)
    seen = torch.ones(lengths, dtype=torch.bool, device="cuda").tril(lengths[1] - lengths[0])
    out = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(*lengths))
    assert calls == ["forward"]
    compare(out[:, :, first:], math_attention(q[:, :, first:], k, v, seen[first:]), (q, k, v))


@pytest.mark.gpu
def test_the_order_of_backends_is_as_it_was() -> None:
    x = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    scaled_dot_product_attention(x, x, x)
    before = torch._C._get_sdp_priority_order()
    with enable_sdpa():
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.FLASH_ATTENTION)
    assert torch._C._get_sdp_priority_order() == before
    with enable_sdpa():
        others = list(reversed(before))
        torch._C._set_sdp_priority_order(others)
    try:
        assert torch._C._get_sdp_priority_order() == others
    finally:
        torch._C._set_sdp_priority_order(before)


def _runs_on_ours(calls: list[str]) -> bool:
    calls.clear()
    x = torch.randn(1, 1, 4, 8)
    scaled_dot_product_attention(x, x, x)
    return calls == ["forward"]


def test_enabling_and_disabling(calls: list[str]) -> None:
    assert "fa_cuda" in list_flash_attention_impls()
    disable_sdpa()
    assert not _runs_on_ours(calls)
    enable_sdpa()
    enable_sdpa()
    assert current_flash_attention_impl() == "fa_cuda"
    assert _runs_on_ours(calls)
    disable_sdpa()
    assert current_flash_attention_impl() is None
    assert not _runs_on_ours(calls)
    disable_sdpa()
    with enable_sdpa():
        with enable_sdpa():
            assert _runs_on_ours(calls)
        assert _runs_on_ours(calls)
    assert not _runs_on_ours(calls)


def test_other_implementations_in_torchs_registry(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def remove(self) -> None:
            pass

    monkeypatch.setattr(torch.nn.attention._registry, "_FLASH_ATTENTION_IMPLS", {})
    register_flash_attention_impl("fa_cuda", register_fn=sdpa._Replacement)
    register_flash_attention_impl("other", register_fn=Other)
    try:
        activate_flash_attention_impl("other")
        with enable_sdpa():
            assert _runs_on_ours(calls)
        assert current_flash_attention_impl() == "other"
        assert not _runs_on_ours(calls)
        enable_sdpa()
        activate_flash_attention_impl("other")
        assert not _runs_on_ours(calls)
        disable_sdpa()
        assert current_flash_attention_impl() == "other"
        activate_flash_attention_impl("fa_cuda")
        assert _runs_on_ours(calls)
    finally:
        restore_flash_attention_impl()
    assert not _runs_on_ours(calls)


def test_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_HAS_REGISTRY", False)
    with pytest.raises(NotImplementedError, match=r"^enable_sdpa: expected torch 2\.11 or newer"):
        enable_sdpa()
    disable_sdpa()


def test_unmodified_code(device: str, calls: list[str]) -> None:
    q, k, v = make_qkv(device)
    flash_attn = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    namespace: dict[str, Any] = {"q": q, "k": k, "v": v, "torch": torch}
    exec(
        "from flash_attn_cuda import enable_sdpa\n"
        "with enable_sdpa():  # or enable_sdpa() and disable_sdpa()\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)\n",
        namespace,
    )
    assert calls == ["forward"]
    assert torch.equal(namespace["out"], flash_attn.transpose(1, 2))
