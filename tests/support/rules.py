# SPDX-License-Identifier: BSD-3-Clause
"""What a case has beside q, k and v: lengths, packed sequences, biases, masks, slopes and sinks.

A bias, mask or block mask is named by the dimensions that it has, of "bhqk": batch, heads, queries
and keys. The others are broadcast, so "" is one number for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn_cuda.reference import BLOCK, visible_pairs
from tests.support.poison import Embedded, embed

if TYPE_CHECKING:
    from tests.support.cases import Case

LENGTHS = (
    "",
    "q",  # seqlens_q, or seqused_q of packed sequences, is given
    "k",
    "qk",
    "same",  # both are, and are equal
)
DIMS = ("", "b", "h", "q", "k", "bh", "bk", "hk", "qk", "bqk", "bhk", "bhq", "hqk", "bhqk")
BIAS_DATA = (
    "normal",
    "large",
    "holes",  # -inf here and there
)
PADDINGS = ("", "left", "right", "random")
DOCUMENTS = (
    "",
    "runs",  # one after the other
    "shuffled",  # of a few, any for each row
)
SINKS = (
    "",
    "normal",
    "large",  # above most scores, or far below them
    "holes",  # -inf here and there
)
RULE_LAYOUTS = (
    "plain",
    "transposed",  # keys outermost in memory
    "strided",  # every second element of the last dimension
    "sliced",  # gaps after every dimension
    "offset",  # starts one element after an aligned address
    "expanded",  # of biases and masks: stride 0 in what is broadcast, which has its full size
    "trimmed",  # of biases and masks: without the first dimensions, where those are broadcast
)


@dataclass(frozen=True)
class Packing:
    """Where the rows of sequences lie in a packed tensor: `lengths` rows from `cu_seqlens` on."""

    cu_seqlens: Tensor
    lengths: Tensor
    total: int

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence of each row that counts, its place there, and in the packed tensor."""
        lengths = self.lengths.long()
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        place = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
        return sequence, place, self.cu_seqlens.long()[sequence] + place

    def pack(self, padded: Tensor, fill: float) -> Tensor:
        """(batch, seqlen, ...) -> (total, ...), with `fill` in rows of no sequence."""
        sequence, place, row = (index.to(padded.device) for index in self._index)
        packed = padded.new_full((self.total, *padded.shape[2:]), fill)
        packed[row] = padded[sequence, place]
        return packed

    def unpack(self, packed: Tensor, seqlen: int) -> Tensor:
        """(total, ...) -> (batch, seqlen, ...), with 0 past the end of a sequence."""
        sequence, place, row = (index.to(packed.device) for index in self._index)
        padded = packed.new_zeros(len(self.lengths), seqlen, *packed.shape[1:])
        padded[sequence, place] = packed[row]
        return padded


@dataclass(frozen=True)
class Rules:
    """On the host. `arguments` are the public function's, by name, but for the bias."""

    lengths_q: Tensor | None
    lengths_k: Tensor | None
    packing_q: Packing | None
    packing_k: Packing | None
    bias: Tensor | None
    arguments: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


def draw_rules(case: Case, generator: torch.Generator) -> Rules:
    slots_q = slots_k = None
    if case.varlen:
        slots_q = _draw_slots(case.batch, case.seqlen_q, generator)
        slots_k = _draw_slots(case.batch, case.seqlen_k, generator)
        if case.lengths == "same" or case.layout == "packed":
            slots_k = slots_q
    used_q = used_k = None
    if case.lengths in ("q", "qk", "same"):
        used_q = _draw_lengths(case.batch, case.seqlen_q, slots_q, generator)
    if case.lengths in ("k", "qk"):
        used_k = _draw_lengths(case.batch, case.seqlen_k, slots_k, generator)
    if case.lengths == "same":
        used_k = used_q
    word = "seqused" if case.varlen else "seqlens"
    arguments = {f"{word}_q": used_q, f"{word}_k": used_k}
    packing_q = packing_k = None
    if case.varlen:
        around = torch.randint(3, (2,), generator=generator).tolist()
        packing_q, packing_k = (
            _packing(slots_q, used_q, *around),
            _packing(slots_k, used_k, *around),
        )
        used_q, used_k = packing_q.lengths, packing_k.lengths
        arguments |= {"cu_seqlens_q": packing_q.cu_seqlens, "cu_seqlens_k": packing_k.cu_seqlens}
    if case.prefix:
        lengths = torch.full((case.batch,), case.seqlen_k) if used_k is None else used_k
        arguments["prefix_lens"] = _draw_lengths(case.batch, case.seqlen_k, lengths, generator)
    if case.padding:
        arguments["key_padding_mask"] = _padding_mask(case, generator)
    if case.documents:
        arguments["document_ids"] = _document_ids(case, generator)
    full = _full_shapes(case)
    for name, dims in (("attn_mask", case.mask), ("block_mask", case.block_mask)):
        if dims is not None:
            arguments[name] = _bernoulli(dims, full[name], case.density, generator)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    bias = None
    if case.bias is not None:
        visible = visible_pairs(
            case.seqlen_q,
            case.seqlen_k,
            causal=case.causal,
            window_size=case.window,
            **visibility(arguments, used_q, used_k),
        )
        bias = _draw_bias(case, visible.expand(full["attn_bias"]), generator)
    terms = _draw_terms(case, generator)
    return Rules(used_q, used_k, packing_q, packing_k, bias, arguments, terms)


def visibility(
    arguments: dict[str, Tensor], lengths_q: Tensor | None, lengths_k: Tensor | None
) -> dict[str, Tensor | None]:
    """The arguments of `visible_pairs` for sequences that are padded, whether or not they come so
    to the public function."""
    masks = {name: x for name, x in arguments.items() if not name.startswith(("seq", "cu_"))}
    return {**masks, "seqlens_q": lengths_q, "seqlens_k": lengths_k}


def lay_out_rule(x: Tensor, name: str, case: Case) -> Embedded:
    layout, device = case.rule_layout, case.device
    full = _full_shapes(case).get(name)
    if layout == "transposed":
        return embed(x, device, order=range(x.dim())[::-1])
    if layout == "strided":
        return embed(x, device, gaps=[0] * (x.dim() - 1) + [1])
    if layout == "sliced":
        return embed(x, device, gaps=[3] * x.dim())
    if layout == "offset":
        return embed(x, device, start=1)
    if layout == "expanded":
        return embed(x, device, expand=full)
    if layout == "trimmed" and full is not None:
        while x.dim() and x.shape[0] == 1:
            x = x[0]
    return embed(x, device)


def _full_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """What the tensors are broadcast to that may be broadcast."""
    pairs = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    blocks = (*pairs[:2], *(math.ceil(size / BLOCK) for size in pairs[2:]))
    return {"attn_bias": pairs, "attn_mask": pairs, "block_mask": blocks}


def _draw_slots(batch: int, longest: int, generator: torch.Generator) -> Tensor:
    """Rows between one cu_seqlens and the next: any number, but once the longest."""
    slots = torch.randint(longest + 1, (batch,), generator=generator, dtype=torch.int32)
    if batch:
        slots[int(torch.randint(batch, (), generator=generator))] = longest
    return slots


def _draw_lengths(
    batch: int, longest: int, most: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Any, and 0 or the most that there can be more often than by chance."""
    most = torch.full((batch,), longest) if most is None else most
    fraction = torch.rand(batch, generator=generator) * 1.5 - 0.25
    return (fraction.clamp(0, 1) * most).round().int()


def _packing(slots: Tensor, used: Tensor | None, before: int, after: int) -> Packing:
    """before, after: rows of no sequence at both ends of the packed tensor."""
    cu_seqlens = torch.full((len(slots) + 1,), before, dtype=torch.int32)
    cu_seqlens[1:] += slots.cumsum(0)
    return Packing(cu_seqlens, slots if used is None else used, int(cu_seqlens[-1]) + after)


def _padding_mask(case: Case, generator: torch.Generator) -> Tensor:
    if case.padding == "random":
        return torch.rand(case.batch, case.seqlen_k, generator=generator) < case.density
    kept = _draw_lengths(case.batch, case.seqlen_k, None, generator)
    right = torch.arange(case.seqlen_k) < kept[:, None]
    return right if case.padding == "right" else right.flip(1)


def _document_ids(case: Case, generator: torch.Generator) -> Tensor:
    ids = torch.randint(-2, 4, (case.batch, case.seqlen_q), generator=generator)
    if case.documents == "runs":
        changes = torch.rand(case.batch, case.seqlen_q, generator=generator) < 0.05
        ids = changes.cumsum(1)
    return ids.int()


def _bernoulli(
    dims: str, sizes: tuple[int, ...], density: float, generator: torch.Generator
) -> Tensor:
    return torch.rand(_broadcast(dims, sizes), generator=generator) < density


def _draw_bias(case: Case, visible: Tensor, generator: torch.Generator) -> Tensor:
    shape = _broadcast(case.bias or "", visible.shape)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.bias_data == "large":
        bias = 100 * bias
    if case.bias_data == "holes":
        is_hole = torch.rand(shape, generator=generator) < 0.1
        bias = bias.masked_fill(is_hole, -math.inf)
    # What no visible pair uses must not be used at all.
    for dim, size in enumerate(shape):
        if size == 1:
            visible = visible.any(dim, keepdim=True)
    bias = bias.masked_fill(~visible, math.nan)
    return bias.to(getattr(torch, case.bias_dtype or case.dtype))


def _draw_terms(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    terms = {}
    if case.alibi:
        shape = (case.batch, case.heads)[-len(case.alibi) :]
        slopes = 2.0 ** -(8 * torch.rand(shape, generator=generator, dtype=torch.float64))
        terms["alibi_slopes"] = slopes.to(case.terms_dtype)
    if case.sinks:
        sinks = torch.randn(case.heads, generator=generator, dtype=torch.float64)
        if case.sinks == "large":
            sinks = 20 * sinks
        if case.sinks == "holes":
            is_hole = torch.rand(case.heads, generator=generator) < 0.5
            sinks = sinks.masked_fill(is_hole, -math.inf)
        terms["sinks"] = sinks.to(case.terms_dtype)
    return terms


def _broadcast(dims: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if name in dims else 1 for name, size in zip("bhqk", sizes, strict=True))
