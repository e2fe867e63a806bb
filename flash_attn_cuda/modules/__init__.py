# SPDX-License-Identifier: BSD-3-Clause
"""Layers of attention under flash-attn's names (flash_attn.modules.mha)."""

from flash_attn_cuda.modules.attention import FlashCrossAttention, FlashSelfAttention
from flash_attn_cuda.modules.kv_cache import InferenceParams
from flash_attn_cuda.modules.mha import MHA, get_alibi_slopes

__all__ = [
    "MHA",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "InferenceParams",
    "get_alibi_slopes",
]
