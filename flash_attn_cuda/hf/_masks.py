# SPDX-License-Identifier: BSD-3-Clause
"""The mask of a model's forward pass, as the attention of its layers takes it.

transformers describes a mask by a function of (batch, head, query, key), made of a few known
pieces, and asks the attention implementation once per forward pass for a mask of its own kind. Ours
is

- None: nothing but what the layer knows itself, causal or not, and its sliding window;
- bool (batch, keys): which keys exist, beside that. Keys beyond are of a cache not yet filled;
- int32 (batch, seqlen): which document each token is of, beside that;
- bool (batch, 1, queries, keys): every pair that is seen, and the layer adds nothing to it. For one
  query this is no more than a row; for more it is made of pieces that we do not know, and where a
  layer may not know itself what the mask says, or wants a mask to work on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils

from flash_attn_cuda.hf._layers import Layers, layers_of

# Older dynamo cannot look into a function that was made inside the function that it traces.
_DYNAMO_KNOWS_CLOSURES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
# What transformers gives the function that lets positions count within documents.
_REMAPPED = ("mask_function", "position_ids")
# Models whose layers make a mask of the one that they get.
_MASK_MAKERS = ("doge",)


@dataclass(frozen=True)
class _Pattern:
    """What a mask function says.

    ordered: queries and keys are compared by position.
    window: of a sliding one, "left" if causal, or "both"; else "".
    """

    ordered: bool
    documents: Tensor | None = None
    window: str = ""


def mask_of(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """What transformers.AttentionMaskInterface asks for.

    Args:
        batch_size, q_length, kv_length: of the layer's tensors; kv_length may be all that a cache
            can hold.
        q_offset, kv_offset: positions of their first rows.
        cache_position: positions of the queries, which older transformers give instead of q_length
            and q_offset.
        mask_function: which pairs are seen, beside padding.
        attention_mask: bool (batch, positions from 0 on), True where a token exists; or None.
        config: the model's.

    Raises:
        NotImplementedError: a model that computes attention by itself, whatever it was told.
    """
    kind: Any = type(config)
    layers = layers_of(kind)
    if layers.compute_alone:
        raise NotImplementedError(
            "attn_implementation: fa_cuda cannot run in models of "
            f"{type(config).__name__}, which compute attention by themselves; load them with "
            "attn_implementation='eager'. Other versions of transformers may be able to"
        )
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    pattern = _pattern_of(mask_function)
    if pattern is not None and not _is_known(pattern, layers, config, options):
        pattern = None
    tracing = torch.compiler.is_compiling()

    def every_pair() -> Tensor:
        where = {"q_length": q_length, "q_offset": q_offset}
        options.update(
            where if cache_position is None else {"cache_position": cache_position},
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
        )
        mask: Tensor = masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            **options,
        )
        return mask

    if pattern is None:
        return every_pair()
    if pattern.documents is not None:
        return pattern.documents.int() + 1  # true as bool: a token exists
    if not pattern.ordered:
        return _existing(attention_mask, kv_length, kv_length, tracing)
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        if q_length == 1 or tracing:
            return every_pair()
        q_offset, kv_offset = int(q_offset), int(kv_offset)
    end = q_offset + q_length
    keys = end - kv_offset  # up to the last query's own
    if keys > kv_length:
        return every_pair()
    if keys < kv_length and attention_mask is None:
        device = options.get("device") if cache_position is None else cache_position.device
        return torch.ones(batch_size, keys, dtype=torch.bool, device=device)
    return _existing(attention_mask, end, keys, tracing or keys < kv_length)


def _is_known(pattern: _Pattern, layers: Layers, config: Any, options: dict[str, Any]) -> bool:
    """Whether layers know by themselves what the pattern says, and the model needs no mask."""
    is_causal = pattern.ordered and pattern.window != "both"
    skip = "allow_is_causal_skip" if is_causal else "allow_is_bidirectional_skip"
    is_wanted = options.get(skip) is False and pattern.documents is None
    if is_wanted or not layers.know_causal or getattr(config, "model_type", "") in _MASK_MAKERS:
        return False
    if pattern.window:
        # Of windows to both sides layers tell the width, or one more.
        return layers.know_window and pattern.window == "left"
    has_one = getattr(config, "sliding_window", None) is not None
    is_of_all = has_one and getattr(config, "layer_types", None) is None
    return not (is_of_all and layers.know_window)


def _existing(attention_mask: Tensor | None, end: int, count: int, always: bool) -> Tensor | None:
    """Which of the last `count` keys before position `end` exist; None where all do, which waits
    for the GPU and is not asked where the mask is needed `always`.

    generate() hands a model masks that we made, for us to make again: from a mask of so many keys
    comes the same mask.
    """
    if attention_mask is None:
        return None
    exists = attention_mask[:, :end][:, -count:]
    if exists.shape[1] < count:
        exists = pad(exists, (0, count - exists.shape[1]))
    return exists if always or not exists.all() else None


def _pattern_of(mask_function: Callable[..., Tensor]) -> _Pattern | None:
    """None for a function of other pieces than those that layers and kernels know."""
    if mask_function is masking_utils.causal_mask_function:
        return _Pattern(ordered=True)
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return _Pattern(ordered=False)
    if torch.compiler.is_compiling() and not _DYNAMO_KNOWS_CLOSURES:
        return None
    # Other pieces are made by functions of masking_utils, and told apart by what these gave them.
    code = getattr(mask_function, "__code__", None)
    names = code.co_freevars if code is not None else ()
    if names == ("sliding_window",):
        is_of_both = mask_function.__qualname__.startswith("sliding_window_bidirectional")
        return _Pattern(ordered=True, window="both" if is_of_both else "left")
    if names not in {("mask_functions",), ("packed_sequence_mask",), _REMAPPED}:
        return None
    given = dict(
        zip(names, [cell.cell_contents for cell in mask_function.__closure__ or ()], strict=True)
    )
    if names == ("packed_sequence_mask",):
        return _Pattern(ordered=False, documents=given["packed_sequence_mask"])
    if names == _REMAPPED:  # positions count from each document's start, which moves no window
        return _pattern_of(given["mask_function"])
    if mask_function.__name__ != "and_mask":
        return None
    return _all_of([_pattern_of(piece) for piece in given["mask_functions"]])


def _all_of(patterns: list[_Pattern | None]) -> _Pattern | None:
    ordered, documents, window = False, None, ""
    for pattern in patterns:
        if pattern is None or (documents is not None and pattern.documents is not None):
            return None
        ordered = ordered or pattern.ordered
        documents = pattern.documents if documents is None else documents
        window = pattern.window or window
    return _Pattern(ordered, documents, window)
