# SPDX-License-Identifier: BSD-3-Clause
"""Decoding with a cache of keys and values is the whole forward pass, a part at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda.modules import MHA, InferenceParams

SEQLEN = 13
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, rotary": {"num_heads_kv": 2, "rotary_emb_dim": 8},
    "xPos": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 16.0},
    "ALiBi": {"use_alibi": True, "num_heads_kv": 1},
    "window": {"window_size": (4, 0), "rotary_emb_dim": 4},
    "queries apart": {"cross_attn": True, "num_heads_kv": 3},
}
options_of_layers = pytest.mark.parametrize("name", OPTIONS)


def _layer(device: str = "cpu", **options: Any) -> MHA:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"causal": True, "layer_idx": 3, **options}
    return MHA(48, 6, device=device, dtype=dtype, **options).eval()


def _hidden(layer: MHA, batch: int = 2, seqlen: int = SEQLEN) -> Tensor:
    return torch.randn(batch, seqlen, 48).to(layer.out_proj.weight)


def _poisoned_params(layer: MHA, batch: int = 2, **arguments: Any) -> InferenceParams:
    """With a cache of NaN: what nobody wrote must not be read."""
    params = InferenceParams(max_seqlen=SEQLEN + 3, max_batch_size=batch, **arguments)
    cache = layer.allocate_inference_cache(batch, SEQLEN + 3).fill_(math.nan)
    params.key_value_memory_dict[3] = cache
    return params


def _assert_close(got: Tensor, expected: Tensor) -> None:
    tolerance = 4e-2 if got.dtype == torch.bfloat16 else 1e-5
    error = (got - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


@options_of_layers
@pytest.mark.parametrize("steps", [(1,) * SEQLEN, (7, 1, 1, 4), (SEQLEN,)], ids=str)
@torch.inference_mode()
def test_decoding_is_the_whole_forward_pass(name: str, steps: tuple[int, ...], device: str) -> None:
    layer = _layer(device, **OPTIONS[name])
    x = _hidden(layer)
    params = _poisoned_params(layer)
    parts = []
    for step in steps:
        new = x[:, params.seqlen_offset : params.seqlen_offset + step]
        parts.append(layer(new, inference_params=params))
        params.seqlen_offset += step
    _assert_close(torch.cat(parts, dim=1), layer(x))


@options_of_layers
@torch.no_grad()
def test_sequences_of_different_lengths(name: str, device: str) -> None:
    """Prompts of 5, 2 and 8 tokens, padded on the right; then one token at a time."""
    layer = _layer(device, **OPTIONS[name])
    x = _hidden(layer, 3)
    prompts = torch.tensor([5, 2, 8], dtype=torch.int32, device=device)
    params = _poisoned_params(layer, 3, lengths_per_sample=torch.zeros_like(prompts))
    whole = layer(x)
    out = layer(x[:, :8], inference_params=params)
    for b, length in enumerate(prompts.tolist()):
        _assert_close(out[b, :length], whole[b, :length])
    params.lengths_per_sample.copy_(prompts)
    sequences = torch.arange(3, device=device)
    for _ in range(5):
        position = params.lengths_per_sample.long()
        out = layer(x[sequences, position][:, None], inference_params=params)
        _assert_close(out[:, 0], whole[sequences, position])
        params.lengths_per_sample += 1


@torch.no_grad()
def test_prompts_padded_on_the_left(device: str) -> None:
    layer = _layer(device, rotary_emb_dim=8)
    x, padding = _hidden(layer), 4
    exists = torch.ones(2, SEQLEN, dtype=torch.bool, device=device)
    exists[1, :padding] = False
    params = _poisoned_params(layer)
    parts = []
    for begin, end in ((0, 6), (6, 7), (7, SEQLEN)):
        params.seqlen_offset = begin
        parts.append(layer(x[:, begin:end], None, exists[:, :end], inference_params=params))
    out = torch.cat(parts, dim=1)
    _assert_close(out[:1], layer(x[:1]))
    _assert_close(out[1:, padding:], layer(x[1:, padding:]))


@torch.no_grad()
def test_a_part_of_the_batch() -> None:
    layer = _layer(rotary_emb_dim=8)
    x = _hidden(layer)
    whole = layer(x)
    params = _poisoned_params(layer, 4, batch_size_offset=2)
    for t in range(SEQLEN):
        params.seqlen_offset = t
        _assert_close(layer(x[:, t : t + 1], inference_params=params), whole[:, t : t + 1])
    assert params.key_value_memory_dict[3][:2].isnan().all()


@torch.no_grad()
def test_a_part_of_the_batch_by_lengths() -> None:
    layer = _layer(rotary_emb_dim=8)
    x = _hidden(layer)
    lengths = torch.tensor([9, 9, 0, 0], dtype=torch.int32)
    params = _poisoned_params(layer, 4, batch_size_offset=2, lengths_per_sample=lengths)
    _assert_close(layer(x, inference_params=params), layer(x))
    assert params.key_value_memory_dict[3][:2].isnan().all()


@torch.no_grad()
def test_caches_are_made_once_and_can_be_used_again() -> None:
    layer = _layer()
    params = InferenceParams(max_seqlen=9, max_batch_size=3)
    x = _hidden(layer, seqlen=5)
    first = layer(x, inference_params=params)
    cache = params.key_value_memory_dict[3]
    assert cache.shape == (3, 9, 2, 6, 8)
    params.seqlen_offset = 5
    params.lengths_per_sample = torch.tensor([5, 5, 5], dtype=torch.int32)
    params.reset(max_seqlen=7, max_batch_size=2)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (7, 2, 0)
    assert params.lengths_per_sample.tolist() == [0, 0, 0]
    _assert_close(layer(x, inference_params=params), first)
    assert params.key_value_memory_dict == {3: cache}


@torch.no_grad()
def test_any_object_with_these_attributes_does() -> None:
    layer = _layer()
    x = _hidden(layer)
    params = SimpleNamespace(
        max_seqlen=SEQLEN,
        max_batch_size=2,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
    )
    _assert_close(layer(x, inference_params=params), layer(x))


def test_allocation() -> None:
    layer = _layer(num_heads_kv=2).half()
    cache = layer.allocate_inference_cache(3, 11)
    assert cache.shape == (3, 11, 2, 2, 8)
    assert cache.dtype == torch.float16
    assert layer.allocate_inference_cache(3, 11, torch.bfloat16).dtype == torch.bfloat16
    assert not cache.requires_grad


@torch.no_grad()
def test_autocast_fills_a_cache_of_the_weights() -> None:
    layer = _layer(rotary_emb_dim=8)
    x = _hidden(layer)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, inference_params=_poisoned_params(layer))
    assert out.dtype == torch.bfloat16
    _assert_close(out, expected)


@torch.no_grad()
def test_one_graph_serves_all_lengths(device: str) -> None:
    """With lengths in a tensor every step is the same work."""
    torch._dynamo.reset()
    layer = _layer(device, rotary_emb_dim=8)
    x = _hidden(layer)
    whole = layer(x)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    params = _poisoned_params(layer, lengths_per_sample=lengths)
    step = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(SEQLEN):
            out = step(x[:, t : t + 1], inference_params=params)
            _assert_close(out, whole[:, t : t + 1])
            params.lengths_per_sample += 1


@pytest.mark.gpu
@torch.no_grad()
def test_wrong_lengths_stay_in_the_cache_on_cuda() -> None:
    layer = _layer("cuda")
    lengths = torch.tensor([1 << 30, -5], dtype=torch.int32, device="cuda")
    params = _poisoned_params(layer, lengths_per_sample=lengths)
    layer(_hidden(layer, seqlen=1), inference_params=params)
    written = ~params.key_value_memory_dict[3].isnan().flatten(2)
    rows = torch.zeros_like(written)
    rows[0, (1 << 30) % (SEQLEN + 3)] = rows[1, -5] = True
    assert torch.equal(written, rows)


PER_SAMPLE = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen_offset": 4}, r"^seqlen_offset: .* 13 tokens before max_seqlen 16, got 4"),
        ({"seqlen_offset": -1}, r"^seqlen_offset: .* got -1"),
        ({"lengths_per_sample": PER_SAMPLE + 4}, r"^lengths_per_sample: .* got \[4, 4\]"),
        ({"lengths_per_sample": PER_SAMPLE - 1}, r"^lengths_per_sample: .* got \[-1, -1\]"),
        ({"lengths_per_sample": PER_SAMPLE[:1]}, r"^lengths_per_sample: .* \(2,\), got \(1,\)"),
        ({"batch_size_offset": 1}, r"^batch_size_offset: .* 2 sequences .* 2, got 1"),
        ({"batch_size_offset": -1}, r"^batch_size_offset: .* got -1"),
        (
            {"key_value_memory_dict": {3: torch.zeros(2, 16, 2, 3, 8)}},
            r"^key_value_memory_dict\[3\]: .* \(2, 16, 2, 6, 8\), .* got \(2, 16, 2, 3, 8\)",
        ),
        (
            {"key_value_memory_dict": {3: torch.zeros(2, 15, 2, 6, 8)}},
            r"^key_value_memory_dict\[3\]: .* got \(2, 15, 2, 6, 8\)",
        ),
        (
            {"key_value_memory_dict": {3: torch.zeros(1, 16, 2, 6, 8)}},
            r"^key_value_memory_dict\[3\]: .* got \(1, 16, 2, 6, 8\)",
        ),
    ],
)
@pytest.mark.parametrize("rotary_emb_dim", [0, 8])
@torch.no_grad()
def test_what_does_not_fit(changes: dict[str, Any], message: str, rotary_emb_dim: int) -> None:
    layer = _layer(rotary_emb_dim=rotary_emb_dim)
    params = _poisoned_params(layer)
    for name, value in changes.items():
        setattr(params, name, value)
    with pytest.raises(ValueError, match=message):
        layer(_hidden(layer), inference_params=params)


@torch.no_grad()
def test_what_does_not_go_together() -> None:
    layer = _layer()
    x, rows = _hidden(layer), torch.tensor([0, SEQLEN], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^inference_params: expected None beside cu_seqlens"):
        layer(x[0], cu_seqlens=rows, inference_params=_poisoned_params(layer))
    apart = _layer(cross_attn=True)
    for arguments in ({"x_kv": x}, {"mixer_subset": slice(1)}):
        with pytest.raises(ValueError, match=r": expected None beside inference_params"):
            apart(x, **arguments, inference_params=_poisoned_params(apart))
    nameless = _layer(layer_idx=None)
    with pytest.raises(ValueError, match=r"^layer_idx: expected a number"):
        nameless(x, inference_params=_poisoned_params(nameless))


def test_there_are_no_gradients() -> None:
    layer = _layer()
    with pytest.raises(NotImplementedError, match=r"^inference_params: .* torch.no_grad"):
        layer(_hidden(layer), inference_params=_poisoned_params(layer))
