# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention in linear memory: FlashAttention on CUDA and on the CPU."""

from flash_attn_cuda._version import __version__
from flash_attn_cuda.functional import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from flash_attn_cuda.introspect import Decision, Explanation, build_info, explain
from flash_attn_cuda.sdpa import disable_sdpa, enable_sdpa
from flash_attn_cuda.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "Decision",
    "Explanation",
    "__version__",
    "build_info",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]
