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


def _seqlen_first(module: str, function: str = "flash_attn_func", **options: Any) -> Provider:
    attention = getattr(import_module(module), function)

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = attention(q, k, v, causal=causal, **options)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return Provider(call)


def _sdpa(backend: SDPBackend) -> Provider:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Provider(call, heads_first=True, context=partial(sdpa_kernel, backend))


_MAKERS: dict[str, Callable[[], Provider]] = {
    "flash_attn_cuda": partial(_seqlen_first, "flash_attn_cuda"),
    "deterministic": partial(_seqlen_first, "flash_attn_cuda", deterministic=True),
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "eager": partial(_seqlen_first, "flash_attn_cuda.reference", "standard_attention"),
    "flash_attn": partial(_seqlen_first, "flash_attn"),
    "flash_attn_interface": partial(_seqlen_first, "flash_attn_interface"),
}
_OPTIONAL = ("flash_attn", "flash_attn_interface")

NAMES = tuple(_MAKERS)


def present() -> list[str]:
    """All but the packages that are not installed."""
    return [name for name in NAMES if name not in _OPTIONAL or find_spec(name) is not None]


@cache
def load(name: str) -> Provider:
    """Raises ImportError where the provider's package is not installed or does not load."""
    return _MAKERS[name]()
