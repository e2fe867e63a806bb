# SPDX-License-Identifier: BSD-3-Clause
"""Patching models that exist, what it reports, what it refuses, and that nothing fails silently."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from flash_attn_cuda import hf
from tests.support.hf_models import MODELS, VOCABULARY, Model, make_inputs, tokens
from tests.support.operators import CountOperators

EXISTING = [model for model in MODELS if model.exists]


def _bloom() -> Any:
    """A model with attention of its own."""
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


def _llama(implementation: str = "sdpa") -> Any:
    return next(model for model in MODELS if model.name == "llama").make(implementation)


def _calls(model: nn.Module, inputs: dict[str, Any]) -> int:
    with CountOperators() as count, torch.no_grad():
        model(**inputs)
    return count.forward


@pytest.mark.parametrize("model", EXISTING, ids=lambda model: model.name)
def test_a_model_is_patched_and_unpatched_or_refused(model: Model) -> None:
    patched = model.make("eager")
    inputs = make_inputs(model, "left")
    expected = patched(**inputs).logits
    if not model.patchable:
        with pytest.raises(ValueError, match=rf"got {model.architecture}, which computes att"):
            hf.patch_hf_model(patched)
        assert torch.equal(patched(**inputs).logits, expected)
        return
    report = hf.patch_hf_model(patched)
    assert len(report.patched) == model.attentions
    assert not report.skipped
    assert all(patched.get_submodule(name) is not None for name in report.patched)
    assert _calls(patched, inputs) == model.attentions
    hf.unpatch_hf_model(patched)
    assert _calls(patched, inputs) == 0
    assert torch.equal(patched(**inputs).logits, expected)


def test_the_name_that_a_model_had_comes_back() -> None:
    model = _llama("sdpa")
    inputs = {"input_ids": tokens(1, 8)}
    for _ in range(2):  # once more changes nothing, and once is enough to undo
        hf.patch_hf_model(model)
        assert model.config._attn_implementation == "fa_cuda"
    assert _calls(model, inputs) == 2
    hf.unpatch_hf_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert _calls(model, inputs) == 0
    with pytest.raises(ValueError, match=r"^model: expected one that patch_hf_model\(\) was given"):
        hf.unpatch_hf_model(model)


def test_a_patched_model_is_not_kept_alive() -> None:
    model = next(m for m in MODELS if m.name == "gpt2").make("sdpa").transformer
    hf.patch_hf_model(model)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_part_that_cannot_be_patched_is_named() -> None:
    both = nn.ModuleDict({"llama": _llama(), "bloom": _bloom()})
    with pytest.warns(UserWarning, match="stay as they are") as warned:
        report = hf.patch_hf_model(both)
    assert len(report.patched) == 2
    assert report.skipped == tuple(f"bloom.transformer.h.{i}.self_attention" for i in range(2))
    assert str(warned[0].message) == str(report)
    assert _calls(both["llama"], {"input_ids": tokens(1, 8)}) == 2
    assert _calls(both["bloom"], {"input_ids": tokens(1, 8)}) == 0


def test_what_cannot_be_patched_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got Bloom.*: transformer.h.0.self_attention, trans"):
        hf.patch_hf_model(_bloom())
    with pytest.raises(ValueError, match="it has no attention module"):
        hf.patch_hf_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got str"):
        hf.patch_hf_model("gpt2")  # type: ignore[arg-type]


def test_probabilities_are_refused() -> None:
    model = _llama()
    hf.patch_hf_model(model)
    with pytest.raises(ValueError, match=r"^output_attentions: expected False, got True; fa_cuda"):
        model(input_ids=tokens(1, 8), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


@pytest.mark.parametrize("found", ["4.52.4", None])
def test_an_old_transformers_or_none_is_refused(found: str | None) -> None:
    program = f"""
import importlib.metadata
def version(name, found={found!r}, original=importlib.metadata.version):
    if name == "transformers" and found is None:
        raise importlib.metadata.PackageNotFoundError
    return found if name == "transformers" else original(name)
importlib.metadata.version = version
import flash_attn_cuda.hf
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(rf"^ImportError: .*needs transformers 4.53 .* {found or 'none'}", last)


def test_importing_registers_nothing() -> None:
    program = """
import flash_attn_cuda.hf as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry
assert hf.NAME not in registry
hf.register()
hf.register()
assert hf.NAME in registry
"""
    subprocess.run([sys.executable, "-c", program], check=True)
