# SPDX-License-Identifier: BSD-3-Clause
"""Implementations of attention to time, by name.

Each takes tensors in its own layout, so that no transposing is timed: SDPA gets
(batch, heads, seqlen, head_dim) views of the (batch, seqlen, heads, head_dim) memory of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Provider:
    attention: Attention
    heads_first: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered outside the timing

    def view(self, x: Tensor) -> Tensor:
        """A (batch, seqlen, heads, head_dim) tensor in this provider's layout, detached."""
        return x.detach().transpose(1, 2) if self.heads_first else x.detach()

    def seqlen_first(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Attention of (batch, seqlen, heads, head_dim) tensors, whatever the provider's layout."""
        if not self.heads_first:
            return self.attention(q, k, v, causal)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return self.attention(*heads_first, causal).transpose(1, 2)


def _seqlen_first(module: str, function: str = "flash_attn_func", **options: Any) -> Provider:
    attention = getattr(import_module(module), function)

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = attention(q, k, v, causal=causal, **options)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return Provider(call)


def _sdpa(backend: SDPBackend) -> Provider:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return Provider(call, heads_first=True, context=partial(sdpa_kernel, backend))


def _flex() -> Provider:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @cache
    def causal_mask(seqlen: int, device: torch.device) -> Any:
        sees = lambda batch, head, query, key: query >= key  # noqa: E731
        return create_block_mask(sees, None, None, seqlen, seqlen, device=str(device))

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        mask = causal_mask(q.shape[2], q.device) if causal else None
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return Provider(call, heads_first=True)


_MAKERS: dict[str, Callable[[], Provider]] = {
    "flash_attn_cuda": partial(_seqlen_first, "flash_attn_cuda"),
    "deterministic": partial(_seqlen_first, "flash_attn_cuda", deterministic=True),
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
    "eager": partial(_seqlen_first, "flash_attn_cuda.reference", "standard_attention"),
    "flash_attn": partial(_seqlen_first, "flash_attn"),
    "flash_attn_interface": partial(_seqlen_first, "flash_attn_interface"),
    "flash_attn.cute": partial(_seqlen_first, "flash_attn.cute"),
}
_OPTIONAL = ("flash_attn", "flash_attn_interface", "flash_attn.cute")

NAMES = tuple(_MAKERS)


def present() -> list[str]:
    """All but the packages that are not installed."""
    return [name for name in NAMES if name not in _OPTIONAL or _installed(name)]


def _installed(module: str) -> bool:
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


@cache
def load(name: str) -> Provider:
    """Raises ImportError where the provider's package is not installed or does not load."""
    return _MAKERS[name]()
