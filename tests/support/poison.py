# SPDX-License-Identifier: BSD-3-Clause
"""Make memory that must not matter hold NaN, so that a kernel which reads it is found out.

* `embed` lays a tensor out inside a larger buffer that is NaN everywhere else: before it, after it
  and in the gaps that its strides leave. `Embedded.check_untouched` finds any byte that a kernel
  wrote there.
* `poisoned_allocations` makes fresh memory hold NaN, so that an output element that no kernel
  writes, or a workspace that is read before it is written, shows as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

# Elements of NaN on both sides: more than any vector load, and a multiple of every alignment.
CANARY = 512


@dataclass(frozen=True)
class Embedded:
    """`view` is a window on `buffer`; the rest of the buffer is NaN, or what stands for it."""

    view: Tensor
    buffer: Tensor
    snapshot: Tensor  # the bytes of the buffer before any kernel ran

    def check_untouched(self) -> None:
        changed = (_bytes(self.buffer) != self.snapshot).nonzero()
        if changed.numel():
            first = changed[0].item() // self.buffer.element_size()
            raise AssertionError(
                f"{changed.numel()} bytes of an input's buffer were written; the first is in "
                f"element {first} of {self.buffer.numel()}, and the input starts at element "
                f"{self.view.storage_offset()}"
            )


def embed(
    values: Tensor,
    device: str = "cpu",
    *,
    order: Sequence[int] | None = None,
    gaps: Sequence[int] | None = None,
    start: int = 0,
    expand: Sequence[int] | None = None,
    unit_stride: int | None = None,
) -> Embedded:
    """A copy of `values` inside a buffer of NaN on `device`; of the largest number, or of True, if
    the values are integers or bool.

    order: dimensions from the outermost in memory to the innermost; gaps: elements of NaN left
    after each index of a dimension; start: elements between the aligned canary and the tensor;
    expand: shape to broadcast the view to, with strides of 0; unit_stride: the stride that
    dimensions of size 1 are given, which no one may use.
    """
    order = range(values.dim()) if order is None else order
    gaps = [0] * values.dim() if gaps is None else gaps
    strides = [0] * values.dim()
    extent = 1
    for dim in reversed(order):
        strides[dim] = extent + gaps[dim]
        extent = strides[dim] * max(values.shape[dim], 1)
    if unit_stride is not None:
        strides = [
            unit_stride if size == 1 else stride
            for size, stride in zip(values.shape, strides, strict=True)
        ]
    offset = CANARY + start
    buffer = torch.full(
        (offset + extent + CANARY,), _foreign(values.dtype), dtype=values.dtype, device=device
    )
    view = buffer.as_strided(values.shape, strides, offset)
    view.copy_(values)
    snapshot = _bytes(buffer).clone()
    if expand is not None:
        view = view.expand(expand)
    return Embedded(view, buffer, snapshot)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory of floating point type holds NaN inside this context.

    PyTorch fills what torch.empty returns while deterministic algorithms are on. Operators that
    allocate past it get recycled memory, so blocks of many sizes are filled and freed as well. The
    package asks PyTorch for that setting too, and must get the answer it would get outside.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    _recycle_nan("cpu")
    if torch.cuda.is_available():
        _recycle_nan("cuda")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with patch.object(
            torch, "are_deterministic_algorithms_enabled", return_value=deterministic
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _recycle_nan(device: str) -> None:
    blocks = [
        torch.full((size,), float("nan"), device=device)
        for size in (64, 1 << 10, 1 << 13, 1 << 15, 1 << 17)
        for _ in range(4)
    ]
    del blocks


def _foreign(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
