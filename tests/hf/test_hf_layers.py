# SPDX-License-Identifier: BSD-3-Clause
"""Models whose layers do not know what their masks say, or never ask for an attention."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from flash_attn_cuda import hf
from flash_attn_cuda.hf import _attention
from flash_attn_cuda.hf._masks import mask_of
from tests.support.hf_models import (
    BART,
    GROUPED,
    MODELS,
    VERSION,
    WINDOW,
    Model,
    make_inputs,
    tokens,
    valid_rows,
)
from tests.support.operators import CountOperators

hf.register()

_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2}
ODD = (
    # A window in the mask that layers do not tell.
    Model(
        *("phimoe", "PhimoeForCausalLM", "PhimoeConfig", "decoder"),
        {**GROUPED, **_EXPERTS, "sliding_window": WINDOW},
        patchable_from=(5, 0),
    ),
    Model(
        *("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", "decoder"),
        {
            **GROUPED,
            **_EXPERTS,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 0,
        },
        patchable_from=(5, 0),
    ),
    # One that layers tell, and the mask has not.
    Model(
        *("olmoe", "OlmoeForCausalLM", "OlmoeConfig", "decoder"),
        {**GROUPED, **_EXPERTS, "hidden_size": 64, "sliding_window": WINDOW},
        patchable_from=(5, 0),
    ),
    # One to both sides.
    Model(
        *("mistral both ways", "MistralForCausalLM", "MistralConfig", "decoder"),
        {**GROUPED, "sliding_window": WINDOW, "is_causal": False},
        patchable_from=(5, 24),
    ),
    # Layers that say that they are not causal.
    Model(
        *("nllb_moe", "NllbMoeForConditionalGeneration", "NllbMoeConfig", "both"),
        {**BART, "num_experts": 2, "decoder_sparse_step": 4, "encoder_sparse_step": 4},
        attentions=6,
        patchable_from=(5, 0),
    ),
    # Layers that make a mask of their own of the one they get.
    Model(
        *("doge", "DogeForCausalLM", "DogeConfig", "decoder"),
        {**GROUPED, "keep_window_size": 5},
        patchable_from=(5, 0),
    ),
)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("model", [m for m in ODD if m.patchable], ids=lambda model: model.name)
def test_what_layers_do_not_know_is_in_the_mask(model: Model, padding: str, device: str) -> None:
    eager, ours = (m.to(device) for m in model.make_pair())
    inputs: dict[str, Any] = make_inputs(model, padding)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    with CountOperators() as count, torch.no_grad():
        logits = ours(**inputs).logits
        expected = eager(**inputs).logits
    assert count.forward == model.attentions
    rows = valid_rows(model, inputs, expected)
    assert (logits - expected)[rows].abs().max() <= 2e-5 * expected[rows].abs().max()


LIGHT = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_oss", "deepseek_v3", "bert", "bart")


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", LIGHT)
def test_what_layers_know_takes_no_mask_of_pairs(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(m for m in MODELS if m.name == name)
    if not model.patchable or (name == "bart" and VERSION < (5, 0)):
        pytest.skip("not in this transformers")
    seen = []

    def note(*qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append({k for k, x in options.items() if isinstance(x, torch.Tensor)} - {"sinks"})
        return torch.empty(*qkv[0].shape[:3], qkv[2].shape[3])

    monkeypatch.setattr(_attention, "flash_attn_func", note)
    with torch.no_grad():
        model.make("fa_cuda")(**make_inputs(model, padding))
    assert len(seen) == model.attentions
    assert set().union(*seen) == (set() if padding == "none" else {"key_padding_mask"})


@pytest.mark.skipif(VERSION < (5, 20), reason="masks of its own, in older transformers")
@pytest.mark.parametrize("name", ["Bloom", "GPTNeoXJapanese"])
def test_models_that_compute_attention_alone_are_refused_by_name(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=99, hidden_size=32, num_layers=2)
    config.num_hidden_layers = 2
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="fa_cuda"
    )
    with pytest.raises(NotImplementedError, match=f"fa_cuda cannot run in models of {name}Config"):
        model(input_ids=tokens(1, 8))


def test_one_query_of_a_cache_not_yet_filled_waits_for_nothing() -> None:
    """Its position is on the device: the mask is a row of the pairs that are seen."""
    asks_positions = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
    mask = mask_of(
        batch_size=1,
        kv_length=8,
        mask_function=masking_utils.causal_mask_function,
        config=next(m for m in MODELS if m.name == "llama").make().config,
        **(
            {"cache_position": torch.tensor([3])}
            if asks_positions
            else {"q_length": 1, "q_offset": torch.tensor(3)}
        ),
    )
    assert mask is not None
    assert mask.tolist() == [[[[True] * 4 + [False] * 4]]]


@pytest.mark.parametrize("cache", [False, True])
def test_leaps_of_positions_are_read_as_eager_attention_reads_them(cache: bool) -> None:
    """Beginnings of packed sequences where it has neither a cache nor a mask, else nothing."""
    eager, ours = next(m for m in MODELS if m.name == "llama").make_pair()
    ids = tokens(2, 20)
    leaping = torch.arange(20)[None].expand(2, -1).clone()
    leaping[:, 10:] += 5
    grouped = torch.arange(20)[None].expand(2, -1) // 2
    for positions in (leaping, grouped):
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": cache}
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            got, expected = (m(**inputs, **mask).logits for m in (ours, eager))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
