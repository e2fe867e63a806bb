# SPDX-License-Identifier: BSD-3-Clause
"""Attention under masks and biases and on packed sequences: what masks.py times, and describes.

Masks and biases are made outside the timing, each provider's in the form that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from providers import Provider
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from flash_attn_cuda import flash_attn_func, flash_attn_varlen_func
from flash_attn_cuda.reference import BLOCK, visible_pairs

OURS, VARLEN, PLAIN = "flash_attn_cuda", "flash_attn_cuda.varlen", "flash_attn_cuda.plain"
SDPA = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
DROPOUT_P, SOFTCAP = 0.1, 50.0
DENSITIES = {f"blocks_{percent:g}": percent / 100 for percent in (100, 50, 25, 12.5)}
PROVIDERS_OF: dict[str, tuple[str, ...]] = {
    "varlen": (OURS, "torch_varlen"),
    "bias": (OURS, *SDPA, "flex"),
    "mask": (OURS, *SDPA),
    "window": (OURS, "sdpa_math", "flex"),
    "documents": (OURS, VARLEN, "sdpa_math", "flex"),
    "padding": (OURS, "sdpa_efficient", "sdpa_math"),
    "dropout": (OURS, *SDPA),
    "softcap": (OURS, "flex"),
    "alibi": (OURS, "flex"),
    **dict.fromkeys(DENSITIES, (OURS, PLAIN, "sdpa_math")),
}
Modifier = Callable[..., Tensor]  # of flex_attention


@dataclass(frozen=True)
class Problem:
    """The size that a work is made in, and where."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    device: str
    dtype: str

    @property
    def batch_heads(self) -> int:
        return self.batch * self.heads


@dataclass(frozen=True)
class Work:
    """Attention on q, k, v of one shape, and who computes it."""

    shape: tuple[int, int, int, int]  # (batch, seqlen, heads, head_dim)
    pairs: int  # of a query and a key, in all sequences and heads: what TFLOP/s count
    providers: dict[str, Provider]
    causal: bool = False
    bias: Tensor | None = None


def masked(
    problem: Problem,
    pairs: int,
    sdpa_mask: Tensor | None = None,
    score_mod: Modifier | None = None,
    mask_mod: Modifier | None = None,
    causal: bool = False,
    **arguments: Any,
) -> Work:
    """By flash_attn_func with these arguments, and by its peers with what says the same to them.

    sdpa_mask: by default all pairs, made from the arguments when it is first asked for.
    """
    seqlen, device = problem.seqlen, problem.device

    @cache
    def all_pairs() -> Tensor:
        return visible_pairs(seqlen, seqlen, causal=causal, device=device, **arguments)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        mask = all_pairs() if sdpa_mask is None else sdpa_mask
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)  # causal is in the mask

    @cache
    def flex_mask() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        sizes = (problem.batch, None, seqlen, seqlen)
        return mask_mod and create_block_mask(mask_mod, *sizes, device=device)

    def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return compiled_flex()(q, k, v, score_mod=score_mod, block_mask=flex_mask())

    def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return flash_attn_func(q, k, v, causal=causal, **arguments)

    made = {
        OURS: Provider(ours),
        PLAIN: Provider(lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)),
        "flex": Provider(flex, heads_first=True),
    }
    for name, backend in SDPA.items():
        made[name] = Provider(sdpa, heads_first=True, context=partial(sdpa_kernel, backend))
    shape = (problem.batch, seqlen, problem.heads, problem.head_dim)
    return Work(shape, pairs, made, causal, arguments.get("attn_bias"))


@cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def packed(lengths: list[int], device: str) -> dict[str, Provider]:
    """Sequences that lie one after another in a (batch, seqlen, heads, head_dim) tensor."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = max(lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*rows, cu_seqlens, cu_seqlens, causal=causal).view(q.shape)

    def peer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        limits = (cu_seqlens, cu_seqlens, longest, longest)
        return varlen_attn(*rows, *limits, window_size=(-1, 0 if causal else -1)).view(q.shape)

    return {VARLEN: Provider(ours), "torch_varlen": Provider(peer)}


def causal_pairs(lengths: list[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


def varlen(problem: Problem) -> Work:
    longest = problem.seqlen // 2
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, longest // 64), longest, (16,), generator=draw).tolist()
    made = packed(lengths, problem.device)
    shape = (1, sum(lengths), problem.heads, problem.head_dim)
    return Work(shape, problem.heads * causal_pairs(lengths), made | {OURS: made[VARLEN]}, True)


def bias(problem: Problem) -> Work:
    device, seqlen = problem.device, problem.seqlen
    draw = torch.Generator(device).manual_seed(1)
    size, dtype = (1, problem.heads, seqlen, seqlen), getattr(torch, problem.dtype)
    added = torch.randn(size, generator=draw, device=device, dtype=dtype)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + added[0, head, query, key]

    pairs = problem.batch_heads * seqlen**2
    return masked(problem, pairs, added, score_mod, attn_bias=added)


def mask(problem: Problem) -> Work:
    device, seqlen = problem.device, problem.seqlen
    draw = torch.Generator(device).manual_seed(1)
    seen = torch.rand((1, 1, seqlen, seqlen), generator=draw, device=device) < 0.5
    return masked(problem, problem.batch_heads * seqlen**2, seen, attn_mask=seen)


def window(problem: Problem) -> Work:
    seqlen = problem.seqlen
    left = seqlen // 8

    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= left)

    seen = causal_pairs([seqlen]) - causal_pairs([seqlen - left - 1])
    pairs = problem.batch_heads * seen
    return masked(problem, pairs, mask_mod=mask_mod, causal=True, window_size=(left, 0))


def documents(problem: Problem) -> Work:
    rows = torch.arange(problem.seqlen)
    draw = torch.Generator().manual_seed(0)
    cuts = [torch.randperm(len(rows) - 1, generator=draw)[:5] + 1 for _ in range(problem.batch)]
    ids = torch.stack([(rows[:, None] >= cut).sum(1, dtype=torch.int32) for cut in cuts])
    lengths = torch.cat([of_one.bincount() for of_one in ids]).tolist()
    document_ids = ids.to(problem.device)

    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    pairs = problem.heads * causal_pairs(lengths)
    work = masked(problem, pairs, mask_mod=mask_mod, causal=True, document_ids=document_ids)
    work.providers.update(packed(lengths, problem.device))
    return work


def padding(problem: Problem) -> Work:
    seqlen = problem.seqlen
    padded = round(0.3 * seqlen)
    exists = (torch.arange(seqlen, device=problem.device) >= padded).repeat(problem.batch, 1)
    pairs = problem.batch_heads * seqlen * (seqlen - padded)
    return masked(problem, pairs, exists[:, None, None, :], key_padding_mask=exists)


def causal(problem: Problem, score_mod: Modifier | None = None, **terms: Any) -> Work:
    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    pairs = problem.heads * causal_pairs([problem.seqlen] * problem.batch)
    return masked(problem, pairs, score_mod=score_mod, mask_mod=mask_mod, causal=True, **terms)


def dropout(problem: Problem) -> Work:
    work = causal(problem, dropout_p=DROPOUT_P)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT_P, is_causal=causal)

    for name, backend in SDPA.items():
        work.providers[name] = Provider(
            sdpa, heads_first=True, context=partial(sdpa_kernel, backend)
        )
    return work


def softcap(problem: Problem) -> Work:
    def score_mod(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    return causal(problem, score_mod, softcap=SOFTCAP)


def alibi(problem: Problem) -> Work:
    heads = torch.arange(1, problem.heads + 1, device=problem.device)
    slopes = torch.exp2(-8.0 * heads / problem.heads)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key)

    return causal(problem, score_mod, alibi_slopes=slopes)


def blocks(problem: Problem, density: float) -> Work:
    seqlen = problem.seqlen
    sizes = torch.tensor([min(BLOCK, seqlen - first) for first in range(0, seqlen, BLOCK)])
    draw = torch.Generator().manual_seed(0)
    size = (1, problem.heads, len(sizes), len(sizes))
    seen = torch.rand(size, generator=draw) < density
    pairs = problem.batch * int((seen * sizes[:, None] * sizes).sum())
    return masked(problem, pairs, block_mask=seen.to(problem.device))


MAKERS: dict[str, Callable[[Problem], Work]] = {
    **{"varlen": varlen, "bias": bias, "mask": mask, "window": window, "documents": documents},
    **{"padding": padding, "dropout": dropout, "softcap": softcap, "alibi": alibi},
    **{name: partial(blocks, density=density) for name, density in DENSITIES.items()},
}


@lru_cache(maxsize=1)
def load(work: str, problem: Problem) -> Work:
    return MAKERS[work](problem)
