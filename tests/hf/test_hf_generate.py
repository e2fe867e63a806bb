# SPDX-License-Identifier: BSD-3-Clause
"""generate() with caches that grow and of a fixed size: token for token as eager attention."""

from __future__ import annotations

import pytest
import torch

from flash_attn_cuda import hf
from tests.support.hf_models import MODELS, WINDOW, Model, make_inputs
from tests.support.operators import CountOperators

hf.register()

GENERATORS = [m for m in MODELS if m.patchable and m.kind in ("decoder", "both", "speech")]
NEW = WINDOW + 3  # past what a sliding cache holds
GREEDY = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "disable_compile": True,
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("model", GENERATORS, ids=lambda model: model.name)
def test_tokens_are_those_of_eager_attention(
    model: Model, padding: str, cache: str, device: str
) -> None:
    eager, ours = (m.to(device) for m in model.make_pair())
    inputs = {
        name: x.to(device)
        for name, x in make_inputs(model, padding, seqlen=12).items()
        if not name.startswith("decoder")
    }
    expected = eager.generate(**inputs, **GREEDY)
    implementation = None if cache == "dynamic" else cache
    if cache == "static":
        try:
            eager.generate(**inputs, **GREEDY, cache_implementation=implementation)
        except (AttributeError, RuntimeError, TypeError) as error:
            pytest.skip(f"this transformers has no such cache for this model: {error}")
    with CountOperators() as count:
        got = ours.generate(**inputs, **GREEDY, cache_implementation=implementation)
    assert torch.equal(got, expected)
    in_encoder = model.attentions // 3 if model.kind != "decoder" else 0
    assert count.forward == in_encoder + NEW * (model.attentions - in_encoder)
    assert count.backward == 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_decoding(name: str) -> None:
    """On a GPU generate() compiles the model for a cache of a fixed size."""
    model = next(m for m in GENERATORS if m.name == name)
    eager, ours = (m.to("cuda") for m in model.make_pair())
    inputs = {k: x.to("cuda") for k, x in make_inputs(model, "left", seqlen=12).items()}
    options = {**GREEDY, "disable_compile": False}
    got = ours.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(got, eager.generate(**inputs, **GREEDY))
