# SPDX-License-Identifier: BSD-3-Clause
"""Packed sequences that only their positions tell."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# All layers of a forward pass get the same positions, and looking at them waits for the GPU: it is
# done once for a version of a tensor.
_known: MutableMapping[Tensor, tuple[int | None, Tensor | None]] = WeakTensorKeyDictionary()


def documents_of(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The document of each token, (batch, seqlen) int32; None where there is but one in each row.

    Args:
        position_ids: (batch or 1, seqlen), or what tells nothing here.
        q, k: (batch, seqlen, ...); earlier keys, of a cache, have positions that nobody tells.
    """
    shape = q.shape[:2]
    if position_ids is None or position_ids.dim() != 2 or k.shape[1] != shape[1] or shape[1] == 1:
        return None
    if position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        return None
    if torch.compiler.is_compiling():
        # Nobody can look: one row may be packed, as transformers' collator makes it; more are not.
        return _count_documents(position_ids) * _is_regular(position_ids) if shape[0] == 1 else None
    documents = _remembered_documents(position_ids)
    return None if documents is None else documents.expand(shape)


def _remembered_documents(position_ids: Tensor) -> Tensor | None:
    # What inference mode made has no version, and may change unseen.
    version = None if position_ids.is_inference() else position_ids._version
    known = _known.get(position_ids)
    if known is None or version is None or known[0] != version:
        documents = _count_documents(position_ids)
        is_packed = (documents[:, -1] > 0).any() & _is_regular(position_ids)
        known = (version, documents if bool(is_packed) else None)
        _known[position_ids] = known
    return known[1]


def _count_documents(position_ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(_starts(position_ids).cumsum(1, dtype=torch.int32), (1, 0))


def _starts(position_ids: Tensor) -> Tensor:
    """Of all but the first, whether they are where their row began."""
    return position_ids[:, 1:] == position_ids[:, :1]


def _is_regular(position_ids: Tensor) -> Tensor:
    """Positions may also leap, repeat or be strided within one sequence."""
    return ((position_ids.diff(dim=1) == 1) | _starts(position_ids)).all()
