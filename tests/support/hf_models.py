# SPDX-License-Identifier: BSD-3-Clause
"""Tiny models of transformers with random weights, and inputs for them; nothing is downloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WINDOW = 7
VOCABULARY = 99
PIXELS, PATCH = 24, 8  # of images, (PIXELS / PATCH) ** 2 patches and a class token
FRAMES = 40  # of speech, half as many after Whisper's convolutions

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Model:
    """A class of transformers with a small configuration.

    kind: "decoder", "encoder", "both" (encoder and decoder), "speech" or "image".
    attentions: how many times a forward pass computes attention.
    patchable_from: the first version of transformers in which the model asks the registry.
    packs_from: the first one in which it tells its attention where packed sequences begin.
    """

    name: str
    architecture: str
    config: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    attentions: int = 2
    patchable_from: tuple[int, int] = (4, 53)
    packs_from: tuple[int, int] = (4, 53)

    @property
    def exists(self) -> bool:
        return hasattr(transformers, self.architecture)

    @property
    def patchable(self) -> bool:
        return self.exists and self.patchable_from <= VERSION

    @property
    def packs(self) -> bool:
        return self.packs_from <= VERSION

    def make(self, implementation: str = "eager", **options: Any) -> Any:
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model = getattr(transformers, self.architecture)._from_config(
            config, attn_implementation=implementation
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than a model begins with: nearly equal scores would tell little.
                noise = torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        return model.eval()

    def make_pair(self, **options: Any) -> tuple[Any, Any]:
        """The same model, eager and ours."""
        eager, ours = self.make("eager", **options), self.make("fa_cuda", **options)
        ours.load_state_dict(copy.deepcopy(eager.state_dict()))
        return eager, ours


MODELS = (
    Model(
        *("gpt2", "GPT2LMHeadModel", "GPT2Config", "decoder"),
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
        packs_from=(5, 1),
    ),
    Model("llama", "LlamaForCausalLM", "LlamaConfig", "decoder", GROUPED),
    Model(
        *("mistral", "MistralForCausalLM", "MistralConfig", "decoder"),
        {**GROUPED, "sliding_window": WINDOW},
    ),
    Model(
        *("gemma2", "Gemma2ForCausalLM", "Gemma2Config", "decoder"),
        {**GROUPED, **_ALTERNATING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9},
    ),
    Model(
        *("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", "decoder"),
        {**GROUPED, **_ALTERNATING, "query_pre_attn_scalar": 9},
    ),
    Model("qwen3", "Qwen3ForCausalLM", "Qwen3Config", "decoder", GROUPED),
    Model(
        *("gpt_oss", "GptOssForCausalLM", "GptOssConfig", "decoder"),
        {**GROUPED, **_ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    Model(
        *("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", "decoder"),
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 2,
        },
    ),
    Model(  # chunks of keys, which no rule of the kernels says: a mask of pairs
        *("llama4", "Llama4ForCausalLM", "Llama4TextConfig", "decoder"),
        {
            **GROUPED,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "moe_layers": [],
        },
        packs_from=(99, 0),  # nothing tells that mask where sequences begin if there is a cache
    ),
    Model("bert", "BertForMaskedLM", "BertConfig", "encoder", _SIZES, patchable_from=(5, 0)),
    Model(
        *("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", "encoder"),
        {**_SIZES, "local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
        patchable_from=(5, 7),
    ),
    Model(
        *("vit", "ViTForImageClassification", "ViTConfig", "image"),
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "num_labels": 5,
        },
    ),
    Model(
        *("t5", "T5ForConditionalGeneration", "T5Config", "both"),
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
        },
        attentions=6,
        patchable_from=(5, 15),
    ),
    Model("bart", "BartForConditionalGeneration", "BartConfig", "both", BART, attentions=6),
    Model(
        *("whisper", "WhisperForConditionalGeneration", "WhisperConfig", "speech"),
        {
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        attentions=6,
    ),
)


def exists_mask(lengths: tuple[int, ...], seqlen: int, side: str) -> Tensor:
    """(batch, seqlen) int64, as tokenizers give it; side: where the padding is."""
    exists = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    return (exists if side == "right" else exists.flip(1)).long()


def tokens(batch: int, seqlen: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, seqlen))


def make_inputs(model: Model, padding: str, batch: int = 3, seqlen: int = 22) -> dict[str, Tensor]:
    """padding: "none", "left" or "right"."""
    lengths = (seqlen, 5, 13)[:batch]
    if model.kind == "image":
        return {"pixel_values": torch.randn(batch, 3, PIXELS, PIXELS)}
    if model.kind == "speech":
        inputs = {"input_features": torch.randn(batch, 8, FRAMES)}
    else:
        inputs = {"input_ids": tokens(batch, seqlen)}
        if padding != "none":
            inputs["attention_mask"] = exists_mask(lengths, seqlen, padding)
    if model.kind in ("both", "speech"):
        inputs["decoder_input_ids"] = tokens(batch, seqlen - 6)
        if padding == "right":
            inputs["decoder_attention_mask"] = exists_mask((9, 16, 4)[:batch], seqlen - 6, padding)
    return inputs


def valid_rows(model: Model, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Of logits, which are compared: rows of tokens that exist. All others are nobody's."""
    name = "attention_mask" if model.kind in ("decoder", "encoder") else "decoder_attention_mask"
    exists = inputs.get(name)
    if exists is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return exists.bool()
