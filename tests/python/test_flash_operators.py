# SPDX-License-Identifier: BSD-3-Clause
"""torch's flash attention operators on our kernels, which run on both devices while ours is
enabled, and what torch's fake kernels promise of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda import flash_attn_func, lowlevel
from tests.support.torch_attention import (
    LAYOUTS,
    LENGTHS,
    compare,
    dtype_of,
    make_qkv,
    math_attention,
)

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("torch 2.11 or newer is needed", allow_module_level=True)
from torch.nn.attention import varlen

aten = torch.ops.aten


@pytest.mark.usefixtures("sdpa_enabled")
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
    q, k, v = make_qkv(device, *lengths, heads_kv, layout)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    seen = torch.ones(lengths, dtype=torch.bool, device=device)
    seen = seen.tril(lengths[1] - lengths[0]) if causal else seen
    first = max(lengths[0] - lengths[1], 0) if causal else 0  # with a key
    assert not out[:, :, :first].any()
    expected = math_attention(q[:, :, first:], k, v, seen[first:], scale=0.3)
    compare(out[:, :, first:], expected, (q, k, v))
    assert calls == ["forward", "backward"]
    assert lse.shape == (2, 4, lengths[0])
    assert lse.dtype == torch.float32


def _dropped(device: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out, and what it has kept."""
    out, *_, rng_state, _, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.25)
    seqlens = (q.shape[2], k.shape[2])
    return out, lowlevel.dropout_mask(rng_state.view(torch.int64), 0.25, 2, 4, *seqlens)


@pytest.mark.usefixtures("sdpa_enabled")
def test_dropout_keeps_the_same_in_both_passes(device: str) -> None:
    q, k, v = make_qkv(device, 70, 60)
    out, kept = _dropped(device, q, k, v)
    assert abs(kept.double().mean().item() - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5
    compare(out, math_attention(q, k, v, dropout_p=0.25, kept=kept), (q, k, v))
    assert not torch.equal(_dropped(device, q, k, v)[1], kept)


@pytest.mark.usefixtures("sdpa_enabled")
def test_dropout_draws_from_torchs_generator(device: str) -> None:
    results = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        results.append(_dropped(device, *make_qkv(device))[0])
    assert torch.equal(results[0], results[2])


def _fake_and_real(operator: Any, inputs: tuple[Any, ...], **options: Any) -> list[tuple[Any, Any]]:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
        fake = operator(*fakes, **options)
    real = operator(*inputs, **options)
    pairs = list(zip(fake, real, strict=True))
    assert all((x is None) == (y is None) for x, y in pairs)
    return [(x, y) for x, y in pairs if isinstance(x, Tensor)]


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchs_fake_kernels_tell_of_our_results(
    device: str, layout: str, dropout_p: float
) -> None:
    with torch.no_grad():
        q, k, v = (x.detach() for x in make_qkv(device, 7, 9, 2, layout))
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
    q = torch.randn(27, 4, 16, device=device, dtype=dtype_of(device), requires_grad=True)
    k, v = torch.randn(2, 33, heads_kv, 16, device=device, dtype=dtype_of(device))
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
        results.append(math_attention(q[None], k[None], v[None], seen)[0].transpose(0, 1))
    return torch.cat(results)


@pytest.mark.usefixtures("sdpa_enabled")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 4)], ids=str)
def test_varlen_attn(device: str, calls: list[str], window: tuple[int, int]) -> None:
    inputs, lengths = _sequences(device)
    out, lse = varlen.varlen_attn(
        *inputs, *lengths, window_size=window, return_aux=varlen.AuxRequest(lse=True)
    )
    compare(out, _each_sequence(inputs, lengths, *window), inputs)
    assert lse.shape == (4, 27)
    assert calls == ["forward", "backward"]


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="torch 2.14 has it")
@pytest.mark.usefixtures("sdpa_enabled")
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


@pytest.mark.gpu
@pytest.mark.usefixtures("sdpa_enabled")
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
    compare(out.transpose(1, 2).values(), expected, inputs)
    assert calls == ["forward", "backward"]


@pytest.mark.usefixtures("sdpa_enabled")
def test_what_is_not_there_raises() -> None:
    q, k, v = make_qkv("cpu")
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
