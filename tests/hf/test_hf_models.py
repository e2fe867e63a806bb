# SPDX-License-Identifier: BSD-3-Clause
"""Logits and gradients of models on our kernels against the same models with eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

from flash_attn_cuda import hf
from tests.support.hf_models import (
    MODELS,
    Model,
    make_inputs,
    tokens,
    valid_rows,
)
from tests.support.operators import CountOperators

hf.register()

PATCHABLE = [model for model in MODELS if model.patchable]
DECODERS = [model for model in PATCHABLE if model.kind == "decoder"]
# Of the largest value: logits, and gradients of each parameter.
LOGITS, GRADIENTS = 1e-5, 1e-4
PACKED = (9, 1, 12)


def _name(model: Model) -> str:
    return model.name


def _gradients(model: Any, logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Of a sum of those rows' logits with random weights."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    loss = (logits * weights.to(logits))[rows].sum()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = zip(parameters, gradients, strict=True)
    return {name: gradient for name, gradient in named if gradient is not None}


def _compare(
    eager: Any, ours: Any, expected: Tensor, logits: Tensor, rows: Tensor, attentions: int
) -> None:
    error = (logits - expected)[rows].abs().max()
    assert error <= LOGITS * expected[rows].abs().max()
    with CountOperators() as count:
        got = _gradients(ours, logits, rows)
    assert count.backward == attentions
    wanted = _gradients(eager, expected, rows)
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), largest / 100)  # of keys it may be exactly 0
        assert (got[name] - gradient).abs().max() <= GRADIENTS * scale, name


def _inputs(model: Model, padding: str, device: str) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in make_inputs(model, padding).items()}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model", PATCHABLE, ids=_name)
def test_logits_and_gradients_are_those_of_eager_attention(
    model: Model, padding: str, device: str
) -> None:
    eager, ours = (m.to(device) for m in model.make_pair())
    inputs = _inputs(model, padding, device)
    with CountOperators() as count:
        logits = ours(**inputs).logits
    assert count.forward == model.attentions
    expected = eager(**inputs).logits
    rows = valid_rows(model, inputs, expected)
    _compare(eager, ours, expected, logits, rows, model.attentions)


def _by_position(batch: int) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in PACKED])
    return {"position_ids": positions.expand(batch, -1)}


def _by_position_without_cache(batch: int) -> dict[str, Any]:
    return {**_by_position(batch), "use_cache": False}


def _by_cu_seq_lens(batch: int) -> dict[str, Any]:
    first_rows = torch.tensor([0, *PACKED]).cumsum(0)  # int64, and lengths as tensors: both occur
    return {
        **_by_position(batch),
        "cu_seq_lens_q": first_rows,
        "cu_seq_lens_k": first_rows,
        "max_length_q": torch.tensor(max(PACKED)),
        "max_length_k": max(PACKED),
    }


@pytest.mark.parametrize(
    ("packing", "batch"),
    [
        (_by_position, 1),
        (_by_position, 2),
        (_by_position_without_cache, 1),
        (_by_position_without_cache, 2),
        (_by_cu_seq_lens, 1),
    ],
)
@pytest.mark.parametrize("model", [m for m in DECODERS if m.packs], ids=_name)
def test_packed_sequences_are_separate_ones(
    model: Model, packing: Callable[[int], dict[str, Any]], batch: int, device: str
) -> None:
    eager, ours = (m.to(device) for m in model.make_pair())
    ids = tokens(batch, sum(PACKED)).to(device)
    told = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in packing(batch).items()}
    with CountOperators() as count:
        logits = ours(input_ids=ids, **told).logits
    assert count.forward == model.attentions
    expected = torch.cat([eager(input_ids=part).logits for part in ids.split(PACKED, 1)], 1)
    rows = valid_rows(model, {}, expected)
    _compare(eager, ours, expected, logits, rows, model.attentions)


def test_positions_that_change_in_place_are_looked_at_again() -> None:
    eager, ours = DECODERS[1].make_pair()
    ids = tokens(1, 12)
    positions = torch.arange(12)[None].contiguous()
    together = ours(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(together, eager(input_ids=ids).logits)
    positions[:, 6:] -= 6
    apart = ours(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(apart[:, 6:], eager(input_ids=ids[:, 6:]).logits)
    with torch.inference_mode():
        apart = ours(input_ids=ids, position_ids=positions.clone()).logits
        torch.testing.assert_close(apart[:, 6:], eager(input_ids=ids[:, 6:]).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_pairs_says_everything(dtype: torch.dtype, device: str) -> None:
    model = next(m for m in DECODERS if m.name == "mistral")
    eager, ours = (m.to(device) for m in model.make_pair())
    ids = tokens(2, 22).to(device)
    seen = torch.rand(2, 1, 22, 22, device=device) < 0.6
    seen |= torch.eye(22, dtype=torch.bool, device=device)  # keys after a query, too
    added = torch.zeros(seen.shape, device=device).masked_fill(
        ~seen, torch.finfo(torch.float32).min
    )
    with CountOperators() as count:
        logits = ours(input_ids=ids, attention_mask=seen if dtype is torch.bool else added).logits
    assert count.forward == model.attentions
    expected = eager(input_ids=ids, attention_mask=added).logits
    _compare(eager, ours, expected, logits, valid_rows(model, {}, logits), model.attentions)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("model", PATCHABLE, ids=_name)
def test_bfloat16_is_as_exact_as_eager_attention(model: Model, padding: str) -> None:
    """Both against float32."""
    eager, ours = (m.to("cuda") for m in model.make_pair())
    inputs = _inputs(model, padding, "cuda")
    exact = eager(**inputs).logits
    rows = valid_rows(model, inputs, exact)
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    errors = [
        (m.bfloat16()(**half).logits.float() - exact)[rows].square().mean().sqrt()
        for m in (eager, ours)
    ]
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("model", DECODERS[:2], ids=_name)
def test_autocast_of_float32_weights(model: Model, device: str) -> None:
    """Rotary embeddings then leave q and k in float32 and v in bfloat16."""
    eager, ours = (m.to(device) for m in model.make_pair())
    inputs = _inputs(model, "left", device)
    exact = eager(**inputs).logits
    rows = valid_rows(model, inputs, exact)
    errors = []
    for m in (eager, ours):
        with torch.autocast(device, torch.bfloat16), CountOperators() as count:
            logits = m(**inputs).logits
        errors.append((logits.float() - exact)[rows].square().mean().sqrt())
    assert count.forward == model.attentions
    assert errors[1] <= 1.2 * errors[0]


def test_dropout_of_training(device: str) -> None:
    model = next(m for m in DECODERS if m.name == "gpt2")
    ours = model.make("fa_cuda", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).to(device)
    ids = tokens(2, 22).to(device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(input_ids=ids).logits

    kept = run(0)
    assert torch.equal(kept, run(1))  # eval()
    ours.train()
    first = run(0)
    assert not torch.equal(first, kept)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_a_cache_not_yet_filled_without_a_mask(device: str) -> None:
    model = next(m for m in DECODERS if m.name == "llama")
    eager, ours = (m.to(device) for m in model.make_pair())
    ids = tokens(2, 9).to(device)
    options = {"config": ours.config, "max_cache_len": 32}
    if not hasattr(cache_utils, "StaticLayer"):  # before 4.54
        options.update(max_batch_size=2, device=device, dtype=torch.float32)
    cache = cache_utils.StaticCache(**options)
    expected = eager(input_ids=ids).logits
    with torch.no_grad():
        first = ours(
            input_ids=ids[:, :6],
            past_key_values=cache,
            cache_position=torch.arange(6, device=device),
        ).logits
        second = ours(
            input_ids=ids[:, 6:],
            past_key_values=cache,
            cache_position=torch.arange(6, 9, device=device),
        ).logits
    torch.testing.assert_close(torch.cat((first, second), 1), expected, rtol=1e-4, atol=1e-4)
