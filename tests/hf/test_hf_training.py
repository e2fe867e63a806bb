# SPDX-License-Identifier: BSD-3-Clause
"""transformers' Trainer on our kernels and on eager attention: the same losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flash_attn_cuda import hf
from tests.support.hf_models import MODELS, exists_mask, tokens
from tests.support.operators import CountOperators

hf.register()

STEPS, BATCH = 3, 4
LENGTHS = (22, 5, 13, 9)


def _samples() -> list[dict[str, Tensor]]:
    rows = [tokens(1, LENGTHS[i % 4])[0] for i in range(STEPS * BATCH)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    rows = [sample["input_ids"] for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    exists = exists_mask(tuple(map(len, rows)), ids.shape[1], "left")
    # The first token that exists is predicted by nothing.
    labels = ids.masked_fill(exists.cumsum(1) <= 1, -100)
    return {"input_ids": ids, "attention_mask": exists, "labels": labels}


def _train(
    model: Any, samples: list[dict[str, Tensor]], collator: Any, folder: Path, **options: Any
) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        optim="sgd",
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = transformers.Trainer(model, arguments, collator, samples)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_padding_and_gradient_checkpointing(
    name: str, reentrant: bool | None, tmp_path: Path
) -> None:
    model = next(m for m in MODELS if m.name == name)
    options: dict[str, Any] = {}
    if reentrant is not None:
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    eager, ours = model.make_pair(**dropout)
    samples = _samples()
    expected = _train(eager, samples, _padded, tmp_path, **options)
    with CountOperators() as count:
        got = _train(ours, samples, _padded, tmp_path, **options)
    assert count.forward == STEPS * model.attentions * (1 if reentrant is None else 2)
    assert count.backward == STEPS * model.attentions
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for (label, parameter), wanted in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-3, atol=1e-4, msg=label)


@pytest.mark.parametrize("told", [False, True])
def test_the_flattening_collator(told: bool, tmp_path: Path) -> None:
    """Eager attention sees where sequences begin only without a cache; ours with one, too."""
    model = next(m for m in MODELS if m.name == "llama")
    eager, ours = model.make_pair()
    eager.config.use_cache = False
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=told)
    samples = [{k: v.tolist() for k, v in sample.items()} for sample in _samples()]
    expected = _train(eager, samples, collator, tmp_path)
    with CountOperators() as count:
        got = _train(ours, samples, collator, tmp_path)
    assert count.backward == STEPS * model.attentions
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_bfloat16_autocast(tmp_path: Path) -> None:
    model = next(m for m in MODELS if m.name == "llama")
    eager, ours = model.make_pair()
    samples = _samples()
    expected = _train(eager, samples, _padded, tmp_path, bf16=True)
    with CountOperators() as count:
        got = _train(ours, samples, _padded, tmp_path, bf16=True)
    assert count.backward == STEPS * model.attentions
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
