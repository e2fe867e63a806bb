# SPDX-License-Identifier: BSD-3-Clause
"""torch's attention on our kernels, against torch's math backend, which stays as it is. Torch's
flash operators run on both devices while ours is enabled, and so do the tests of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda import disable_sdpa, enable_sdpa, flash_attn_func, lowlevel, sdpa

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("torch 2.11 or newer is needed", allow_module_level=True)
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    register_flash_attention_impl,
    restore_flash_attention_impl,
    varlen,
)

aten = torch.ops.aten
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
LENGTHS = [(7, 7), (70, 70), (5, 9), (9, 5)]
LAYOUTS = ["bshd", "bhsd", "packed"]  # order in memory; packed: between others
Step = Callable[..., Tensor]


@pytest.fixture
def enabled() -> Iterator[None]:
    with enable_sdpa():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every pass that our kernels make, in order."""
    made: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(lowlevel, name, counting(name, getattr(lowlevel, name)))
    return made


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _qkv(
    device: str,
    seqlen_q: int = 7,
    seqlen_k: int = 7,
    heads_kv: int = 4,
    layout: str = "bshd",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(2, heads, seqlen, 16), with gradients."""

    def tensor(seqlen: int, heads: int) -> Tensor:
        x = torch.randn(2, seqlen, 3, heads, 16, device=device).to(dtype or _dtype(device))
        x = x[:, :, 1].transpose(1, 2)
        if layout == "bshd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "bhsd":
            x = x.contiguous()
        return x.detach().requires_grad_()

    return tensor(seqlen_q, 4), tensor(seqlen_k, heads_kv), tensor(seqlen_k, heads_kv)


def _math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
) -> Tensor:
    """float64; causal from the top left; GQA."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    mask = None if mask is None else mask.double()
    return aten._scaled_dot_product_attention_math(
        *(q.double(), k.double(), v.double()),
        *(mask, dropout_p, causal, kept),
        scale=scale,
        enable_gqa=True,
    )[0]


def _compare(out: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Both, and the gradients of both."""
    tolerance = TOLERANCES[out.dtype]
    options = {"rtol": tolerance, "atol": tolerance}
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, **options)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    wanted = torch.autograd.grad(expected, inputs, dout.double())
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, **options)


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


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("kind", ["none", "pairs", "keys", "bias", "smallest"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_masks_on_the_cpu(
    calls: list[str], dtype: torch.dtype, lengths: tuple[int, int], kind: str
) -> None:
    q, k, v = _qkv("cpu", *lengths, dtype=dtype)
    mask = _mask(kind, *lengths, dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert calls == ["forward"]
    if kind in ("pairs", "keys"):  # the math backend has NaN as gradients of rows without a key
        mask = mask | ~mask.any(-1, keepdim=True)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    expected = _math(q, k, v, mask, scale=0.3)
    if kind == "smallest":  # whose hidden row has no gradient to rely on in torch's kernel either
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        others = (mask == 0).any(-1, keepdim=True)
        out, expected = out * others, expected * others
    _compare(out, expected, (q, k, v))
    assert calls[-1] == "backward"


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_on_the_cpu_starts_at_the_top_left(
    calls: list[str], lengths: tuple[int, int], layout: str, heads_kv: int
) -> None:
    q, k, v = _qkv("cpu", *lengths, heads_kv, layout)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads_kv != 4)
    assert calls == ["forward"]
    _compare(out, _math(q, k, v, causal=True), (q, k, v))
    assert calls == ["forward", "backward"]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_and_a_mask_in_the_operator_of_the_cpu(lengths: tuple[int, int]) -> None:
    q, k, v = _qkv("cpu", *lengths)
    bias = torch.randn(*lengths)
    out, _ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, attn_mask=bias)
    seen = torch.ones(lengths, dtype=torch.bool).tril()
    _compare(out, _math(q, k, v, bias.masked_fill(~seen, -torch.inf)), (q, k, v))


@pytest.mark.usefixtures("enabled")
def test_a_query_without_keys_is_zero() -> None:
    q, k, v = _qkv("cpu")
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dout = torch.randn_like(out)
    dq, *others = torch.autograd.grad(out, (q, k, v), dout)
    assert not out[:, :, 3].any()
    assert not dq[:, :, 3].any()
    dout[:, :, 3] = 0
    expected = torch.autograd.grad(_math(q, k, v), (q, k, v), dout.double())
    for found, wanted in zip((dq, *others), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("heads_kv", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_flash_operator(
    device: str,
    calls: list[str],
    lengths: tuple[int, int],
    causal: bool,
    layout: str,
    heads_kv: int,
) -> None:
    """Of this operator causal ends at the bottom right."""
    q, k, v = _qkv(device, *lengths, heads_kv, layout)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    seen = torch.ones(lengths, dtype=torch.bool, device=device)
    seen = seen.tril(lengths[1] - lengths[0]) if causal else seen
    first = max(lengths[0] - lengths[1], 0) if causal else 0  # with a key
    assert not out[:, :, :first].any()
    expected = _math(q[:, :, first:], k, v, seen[first:], scale=0.3)
    _compare(out[:, :, first:], expected, (q, k, v))
    assert calls == ["forward", "backward"]
    assert lse.shape == (2, 4, lengths[0])
    assert lse.dtype == torch.float32


def _dropped(device: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out, and what it has kept."""
    out, *_, rng_state, _, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.25)
    seqlens = (q.shape[2], k.shape[2])
    return out, lowlevel.dropout_mask(rng_state.view(torch.int64), 0.25, 2, 4, *seqlens)


@pytest.mark.usefixtures("enabled")
def test_dropout_keeps_the_same_in_both_passes(device: str) -> None:
    q, k, v = _qkv(device, 70, 60)
    out, kept = _dropped(device, q, k, v)
    assert abs(kept.double().mean().item() - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5
    _compare(out, _math(q, k, v, dropout_p=0.25, kept=kept), (q, k, v))
    assert not torch.equal(_dropped(device, q, k, v)[1], kept)


@pytest.mark.usefixtures("enabled")
def test_dropout_draws_from_torchs_generator(device: str) -> None:
    results = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        results.append(_dropped(device, *_qkv(device))[0])
    assert torch.equal(results[0], results[2])


def _fake_and_real(operator: Any, inputs: tuple[Any, ...], **options: Any) -> list[tuple[Any, Any]]:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
        fake = operator(*fakes, **options)
    real = operator(*inputs, **options)
    pairs = list(zip(fake, real, strict=True))
    assert all((x is None) == (y is None) for x, y in pairs)
    return [(x, y) for x, y in pairs if isinstance(x, Tensor)]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchs_fake_kernels_tell_of_our_results(
    device: str, layout: str, dropout_p: float
) -> None:
    with torch.no_grad():
        q, k, v = (x.detach() for x in _qkv(device, 7, 9, 2, layout))
        forward = aten._scaled_dot_product_flash_attention.default
        pairs = _fake_and_real(forward, (q, k, v, dropout_p, True), scale=0.3)
        out, lse, *_, rng_state, unused, _ = forward(q, k, v, dropout_p, True, scale=0.3)
        inputs = (out, q, k, v, out, lse, None, None, 7, 9, dropout_p, True, rng_state, unused)
        pairs += _fake_and_real(
            aten._scaled_dot_product_flash_attention_backward.default, inputs, scale=0.3
        )
        x, y, z = (x.transpose(1, 2) for x in (q, k, v))
        dense = (x, y, z, None, None, 7, 9, dropout_p, True, False)
        pairs += _fake_and_real(aten._flash_attention_forward.default, dense)
        rows = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
        packed = (x[0], y[0, :7], z[0, :7], rows, rows, 4, 4, dropout_p, True, False)
        pairs += _fake_and_real(aten._flash_attention_forward.default, packed)
        if device == "cpu":
            of_cpu = aten._scaled_dot_product_flash_attention_for_cpu
            pairs += _fake_and_real(of_cpu.default, (q, k, v, 0.0, True))
            out, lse = of_cpu(q, k, v, 0.0, True)
            backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
            pairs += _fake_and_real(backward, (out, q, k, v, out, lse, 0.0, True))
    for fake, real in pairs:
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.stride() == real.stride()


def _sequences(device: str, heads_kv: int = 4) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """q, k, v of three sequences, and the arguments of varlen_attn that tell their lengths."""
    q = torch.randn(27, 4, 16, device=device, dtype=_dtype(device), requires_grad=True)
    k, v = torch.randn(2, 33, heads_kv, 16, device=device, dtype=_dtype(device))
    rows_q, rows_k = (
        torch.tensor(rows, dtype=torch.int32, device=device)
        for rows in ([0, 7, 12, 27], [0, 7, 15, 33])
    )
    return (q, k.requires_grad_(), v.requires_grad_()), (rows_q, rows_k, 15, 18)


def _each_sequence(
    inputs: tuple[Tensor, ...], lengths: tuple[Any, ...], left: int, right: int
) -> Tensor:
    results = []
    for i in range(3):
        q, k, v = (
            x[rows[i] : rows[i + 1]].transpose(0, 1)
            for x, rows in zip(inputs, (lengths[0], *[lengths[1]] * 2), strict=True)
        )
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        offset = k.shape[1] - q.shape[1]
        seen = seen.triu(offset - left) if left >= 0 else seen
        seen = seen.tril(offset + right) if right >= 0 else seen
        results.append(_math(q[None], k[None], v[None], seen)[0].transpose(0, 1))
    return torch.cat(results)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 4)], ids=str)
def test_varlen_attn(device: str, calls: list[str], window: tuple[int, int]) -> None:
    inputs, lengths = _sequences(device)
    out, lse = varlen.varlen_attn(
        *inputs, *lengths, window_size=window, return_aux=varlen.AuxRequest(lse=True)
    )
    _compare(out, _each_sequence(inputs, lengths, *window), inputs)
    assert lse.shape == (4, 27)
    assert calls == ["forward", "backward"]


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="torch 2.14 has it")
@pytest.mark.usefixtures("enabled")
def test_varlen_attn_into_a_tensor_with_used_keys_and_gqa(device: str) -> None:
    inputs, lengths = _sequences(device, heads_kv=2)
    used = torch.tensor([7, 2, 11], dtype=torch.int32, device=device)
    out = torch.full_like(inputs[0], torch.nan, requires_grad=False)
    with torch.no_grad():
        varlen.varlen_attn_out(
            out, *inputs, *lengths, enable_gqa=True, seqused_k=used, num_splits=1
        )
        for i, (first, last) in enumerate([(0, 7), (7, 12), (12, 27)]):
            keys = slice(lengths[1][i], lengths[1][i] + used[i])
            q, k, v = inputs[0][first:last], inputs[1][keys], inputs[2][keys]
            expected = flash_attn_func(q[None], k[None], v[None])[0]
            torch.testing.assert_close(out[first:last], expected)


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


@pytest.mark.usefixtures("enabled")
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
    inputs = _qkv(device, 20, 20, 4, layout)
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
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_accepts_the_strides(device: str, calls: list[str], layout: str) -> None:
    torch._dynamo.reset()
    inputs = _qkv(device, 20, 20, 4, layout)
    out = torch.compile(_plain, fullgraph=True)(*inputs)
    _compare(out, 2 * _math(1.5 * inputs[0].double(), *inputs[1:], causal=True), inputs)
    assert calls == ["forward", "backward"]


@pytest.mark.gpu
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("backends", [None, SDPBackend.FLASH_ATTENTION], ids=["default", "flash"])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"dropout_p": 0.25}],
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
    expected = _math(
        *(q, k, v, None, options.get("is_causal", False), options.get("scale")),
        *(dropout_p, kept),
    )
    _compare(out, expected, (q, k, v))
    assert calls == ["forward", "backward"]


@pytest.mark.gpu
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("lengths", [(20, 33), (33, 20)], ids=str)
def test_causal_with_unequal_lengths_on_cuda(calls: list[str], lengths: tuple[int, int]) -> None:
    """From the top left, which torch does itself, and to the bottom right."""
    q, k, v = _qkv("cuda", *lengths)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert calls == []
    _compare(out, _math(q, k, v, causal=True), (q, k, v))
    first = max(lengths[0] - lengths[1], 0)
    seen = torch.ones(lengths, dtype=torch.bool, device="cuda").tril(lengths[1] - lengths[0])
    out = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(*lengths))
    assert calls == ["forward"]
    _compare(out[:, :, first:], _math(q[:, :, first:], k, v, seen[first:]), (q, k, v))


@pytest.mark.gpu
@pytest.mark.usefixtures("enabled")
def test_nested_tensors_on_cuda(calls: list[str]) -> None:
    inputs, (rows, *_) = _sequences("cuda")
    inputs = tuple(x.detach()[:27].requires_grad_() for x in inputs)
    offsets = rows.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=5, max_seqlen=15)
        for x in inputs
    )
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    expected = _each_sequence(inputs, (rows, rows), -1, -1)
    _compare(out.transpose(1, 2).values(), expected, inputs)
    assert calls == ["forward", "backward"]


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


@pytest.mark.usefixtures("enabled")
def test_what_is_not_there_raises() -> None:
    q, k, v = _qkv("cpu")
    dense = (*(x.transpose(1, 2) for x in (q, k, v)), None, None, 7, 7, 0.0, False)
    with pytest.raises(NotImplementedError, match=r"^return_debug_mask: not implemented"):
        aten._flash_attention_forward(*dense, True)
    used = {"seqused_k": torch.tensor([3, 7], dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=r"^seqused_k: .* has no gradient"):
        aten._flash_attention_forward(*dense, False, **used)
    with torch.no_grad():
        assert not aten._flash_attention_forward(*dense, False, **used)[0].isnan().any()
    if "block_table" in str(aten._flash_attention_forward.default._schema):
        with pytest.raises(NotImplementedError, match=r"^block_table: not implemented"):
            aten._flash_attention_forward(*dense, False, block_table=torch.zeros(2, 1).int())
    with pytest.raises(NotImplementedError, match=r"^dropout_p: expected 0\.0, got 0\.5"):
        aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)
    with pytest.raises(ValueError, match=r"^value: expected head_dim 16 like query, got 1"):
        aten._scaled_dot_product_flash_attention(q, k, v[..., :1])
    large = torch.zeros(1, 1, 2, 520)
    with pytest.raises(ValueError, match=r"^head_dim of q, k, v: expected at most 512"):
        scaled_dot_product_attention(large, large, large)


def test_the_readme(device: str, calls: list[str]) -> None:
    q, k, v = _qkv(device)
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
