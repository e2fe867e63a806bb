# SPDX-License-Identifier: BSD-3-Clause
"""Rotary helpers against the formula, pair by pair, as a multiplication of complex numbers."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

ROTARY_DIM = 6
ROWS = 40  # of the tables


def _angles() -> Tensor:
    """(ROWS, ROTARY_DIM / 2): nothing that a mistake could leave as it is."""
    return torch.rand(ROWS, ROTARY_DIM // 2, dtype=torch.float64) * 6


def _tables(angles: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _by_formula(x: Tensor, angles: Tensor, positions: list[list[int]], interleaved: bool) -> Tensor:
    """x (batch, seqlen, heads, head_dim), with the position of each of its rows."""
    out = x.detach().clone()
    half = angles.shape[1]
    for b, row in enumerate(positions):
        for t, position in enumerate(row):
            for h in range(x.shape[2]):
                for i in range(half):
                    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                    z = complex(x[b, t, h, first].item(), x[b, t, h, second].item())
                    z *= cmath.exp(1j * angles[position, i].item())
                    out[b, t, h, first], out[b, t, h, second] = z.real, z.imag
    return out


def _x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([5, 0])], ids=str)
def test_the_formula(interleaved: bool, inplace: bool, offsets: int | Tensor) -> None:
    x, angles = _x(2, 7, 3, 10), _angles()
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 2
    positions = [[start + t for t in range(7)] for start in starts]
    expected = _by_formula(x, angles, positions, interleaved)
    before = x.clone()
    out = apply_rotary_emb(x, *_tables(angles), interleaved, inplace, offsets)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out is x) == inplace
    assert inplace or torch.equal(x, before)


@pytest.mark.parametrize("offsets", [0, torch.tensor([5, 0, 2])], ids=str)
def test_packed_sequences(offsets: int | Tensor) -> None:
    """Three sequences, one of them empty, among rows of none."""
    x, angles = _x(20, 3, 10), _angles()
    cu_seqlens = torch.tensor([2, 9, 9, 18], dtype=torch.int32)
    out = apply_rotary_emb(
        x, *_tables(angles), seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=9
    )
    expected = x.clone()
    for i, (begin, end) in enumerate([(2, 9), (9, 9), (9, 18)]):
        start = int(offsets[i]) if isinstance(offsets, Tensor) else offsets
        positions = [[start + t for t in range(end - begin)]]
        expected[begin:end] = _by_formula(x[None, begin:end], angles, positions, False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_that_of_float32(dtype: torch.dtype) -> None:
    x, angles = _x(2, 7, 3, 10, dtype=dtype), _angles()
    cos, sin = _tables(angles, dtype)
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == dtype
    expected = apply_rotary_emb(x.float(), cos.float(), sin.float()).to(dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_qkv(grouped: bool, interleaved: bool) -> None:
    q, k, v = _x(2, 7, 4, 10), _x(2, 7, 2 if grouped else 4, 10), _x(2, 7, 2 if grouped else 4, 10)
    angles, other = _angles(), _angles()
    positions = [[1 + t for t in range(7)]] * 2
    expected_q = _by_formula(q, angles, positions, interleaved)
    expected_k = _by_formula(k, other, positions, interleaved)
    qkv = torch.cat([q, k, v], dim=2) if grouped else torch.stack([q, k, v], dim=2)
    options: dict[str, Any] = {"num_heads_q": 4} if grouped else {}
    out = apply_rotary_emb_qkv_(
        qkv, *_tables(angles), *_tables(other), interleaved, seqlen_offsets=1, **options
    )
    assert out is qkv
    parts = qkv.split([4, 2, 2], dim=2) if grouped else qkv.unbind(2)
    for part, expected in zip(parts, (expected_q, expected_k, v), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_packed_kv() -> None:
    kv, angles = _x(2, 7, 2, 3, 10), _angles()
    k, v = (x.clone() for x in kv.unbind(2))
    assert apply_rotary_emb_kv_(kv, *_tables(angles), seqlen_offsets=2) is kv
    expected = _by_formula(k, angles, [[2 + t for t in range(7)]] * 2, False)
    torch.testing.assert_close(kv[:, :, 0], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kv[:, :, 1], v)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    cos, sin = _tables(_angles())
    x = _x(2, 3, 2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, cos, sin, interleaved), x)
    qkv = _x(1, 3, 3, 2, 8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda qkv: apply_rotary_emb_qkv_(qkv.clone(), cos, sin, interleaved=interleaved), qkv
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_embedding(interleaved: bool) -> None:
    rotary = RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    angles = torch.outer(torch.arange(50).double(), 100.0 ** -(torch.arange(0, 6, 2).double() / 6))
    for offset, seqlen in ((0, 5), (3, 7), (1, 2)):  # the tables grow, and then need not
        qkv = _x(2, seqlen, 3, 2, 10)
        positions = [[offset + t for t in range(seqlen)]] * 2
        q, k, v = (x.clone() for x in qkv.unbind(2))
        out = rotary(qkv, seqlen_offset=offset)
        assert out is qkv
        for part, given in ((out[:, :, 0], q), (out[:, :, 1], k)):
            expected = _by_formula(given, angles, positions, interleaved)
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(out[:, :, 2], v)
    q, kv = _x(2, 4, 2, 10), _x(2, 4, 2, 1, 10)
    k = kv[:, :, 0].clone()
    expected_q = _by_formula(q, angles, [[9, 10, 11, 12], [0, 1, 2, 3]], interleaved)
    expected_k = _by_formula(k, angles, [[9, 10, 11, 12], [0, 1, 2, 3]], interleaved)
    new_q, new_kv = rotary(q, kv, seqlen_offset=torch.tensor([9, 0]), max_seqlen=13)
    torch.testing.assert_close(new_q, expected_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_kv[:, :, 0], expected_k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_base", [None, 8.0])
@pytest.mark.parametrize("max_seqlen", [None, 9])
def test_embedding_of_packed_sequences(scale_base: float | None, max_seqlen: int | None) -> None:
    """Each sequence as if alone, among rows of none; an empty one too."""
    rotary = RotaryEmbedding(6, scale_base=scale_base)
    cu_seqlens = torch.tensor([2, 9, 9, 18], dtype=torch.int32)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    qkv, heads, q, kv = _x(20, 3, 4, 10), _x(20, 8, 10), _x(20, 4, 10), _x(20, 2, 1, 10)
    given = [t.clone() for t in (qkv, heads, q, kv)]
    assert rotary(qkv, **options) is qkv
    assert rotary(heads, num_heads_q=4, **options) is heads
    new_q, new_kv = rotary(q, kv, **options)
    assert new_q is q
    assert new_kv is kv
    expected = [t.clone() for t in given]
    for begin, end in ((2, 9), (9, 18)):
        alone = [t[None, begin:end].clone() for t in given]
        # The tables' length, on which xPos's middle depends
        length = max_seqlen or 20
        rotary(alone[0], max_seqlen=length)
        rotary(alone[1], max_seqlen=length, num_heads_q=4)
        rotary(alone[2], alone[3], max_seqlen=length)
        for whole, part in zip(expected, alone, strict=True):
            whole[begin:end] = part[0]
    for got, want in zip((qkv, heads, q, kv), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(qkv, given[0])


def test_tables_of_inference_serve_training() -> None:
    rotary = RotaryEmbedding(8)
    with torch.inference_mode():
        rotary(_x(1, 30, 3, 2, 8, dtype=torch.float32))
    x = _x(1, 9, 3, 2, 8, dtype=torch.float32).requires_grad_()
    rotary(x.clone()).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)


def test_one_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    rotary = RotaryEmbedding(6)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in (5, 9, 7):
            qkv = _x(2, seqlen, 3, 2, 10)
            expected = RotaryEmbedding(6)(qkv.clone())
            torch.testing.assert_close(compiled(qkv), expected)
            rotary(_x(2, 30, 3, 2, 10))  # which fills the tables of eager mode


def test_relative_positions_are_all_that_scores_depend_on() -> None:
    """What rotary embeddings are for, and what xPos adds: a factor of the distance alone."""
    q, k = _x(1, 1, 1, 8), _x(1, 1, 1, 8)
    for scale_base in (None, 512.0):
        rotary = RotaryEmbedding(8, scale_base=scale_base)
        kv = torch.stack([k, k], dim=2).expand(1, 30, 2, 1, 8).contiguous()
        new_q, new_kv = rotary(q.expand(1, 30, 1, 8).contiguous(), kv)
        scores = new_q[0, :, 0] @ new_kv[0, :, 0, 0].T
        for distance in range(-5, 6):
            diagonal = scores.diagonal(distance)
            same = diagonal[:1].expand_as(diagonal)
            torch.testing.assert_close(diagonal, same, rtol=1e-5, atol=1e-5)
        if scale_base is not None:
            plain = RotaryEmbedding(8)(q.expand(1, 30, 1, 8).contiguous(), kv)[0]
            for i in range(4):
                base = (2 * i / 8 + 0.4) / 1.4
                factors = base ** ((torch.arange(30).double() - 15) / scale_base)
                for channel in (i, i + 4):
                    expected = plain[0, :, 0, channel] * factors
                    found = new_q[0, :, 0, channel]
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_tables_of_a_module_in_half_precision_are_as_exact() -> None:
    rotary = RotaryEmbedding(8)
    expected = rotary(_x(1, 9, 3, 2, 8, dtype=torch.float16).fill_(1.0))
    found = RotaryEmbedding(8).half()(_x(1, 9, 3, 2, 8, dtype=torch.float16).fill_(1.0))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("x", "tables", "options", "message"),
    [
        ((2, 7, 10), ((40, 3), (40, 3)), {}, r"^x: expected shape \(batch, .* got \(2, 7, 10\)"),
        ((2, 7, 3, 10), ((40, 3), (40, 2)), {}, r"^cos, sin: expected one shape .*\(40, 2\)"),
        ((2, 7, 3, 4), ((40, 3), (40, 3)), {}, r"^cos, sin: expected rotary_dim up to .* 4, got 6"),
        (
            (2, 7, 3, 10),
            ((6, 3), (6, 3)),
            {},
            r"^cos, sin: .* got 6 rows and positions from 0 to 6",
        ),
        ((2, 7, 3, 10), ((9, 3), (9, 3)), {"seqlen_offsets": 3}, r"got 9 rows .* 3 to 9"),
        (
            (2, 7, 3, 10),
            ((40, 3), (40, 3)),
            {"seqlen_offsets": torch.zeros(3).int()},
            r"^seqlen_offsets: expected a number or shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_errors(
    x: tuple[int, ...], tables: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rotary_emb(torch.zeros(x), *map(torch.zeros, tables), **options)


def test_errors_of_packed_tensors() -> None:
    cos, sin = _tables(_angles())
    with pytest.raises(ValueError, match=r"^qkv: expected shape .* and num_heads_q None"):
        apply_rotary_emb_qkv_(_x(2, 7, 8, 10), cos, sin)
    with pytest.raises(ValueError, match=r"^kv: expected shape .* got \(2, 7, 3, 3, 10\)"):
        apply_rotary_emb_kv_(_x(2, 7, 3, 3, 10), cos, sin)
    rows = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^qkv: expected shape \(total, 3, heads, head_dim\)"):
        apply_rotary_emb_qkv_(_x(2, 7, 3, 3, 10), cos, sin, cu_seqlens=rows)
    with pytest.raises(ValueError, match=r"^kv: expected shape \(total, 2, heads, head_dim\)"):
        apply_rotary_emb_kv_(_x(2, 7, 2, 3, 10), cos, sin, cu_seqlens=rows)
    with pytest.raises(ValueError, match=r"^dim: expected a positive even number, got 7"):
        RotaryEmbedding(7)
