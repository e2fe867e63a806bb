# SPDX-License-Identifier: BSD-3-Clause
"""What the public functions share: checks that the compiled code cannot make, windows, autocast."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A Tensor, or a tuple of them where the arguments ask for more than the output.
AttentionResult: TypeAlias = Tensor | Any

NO_WINDOW = (-1, -1)
_UNBOUNDED = 1 << 40  # more keys than any sequence has


def check_packed(name: str, packed: Tensor, shape: str, parts: int) -> None:
    """shape: as messages show it; the parts lie along its third dimension from behind."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != shape.count(",") + 1 or packed.shape[-3] != parts:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(packed.shape)}")


def check_optional(**tensors: object) -> None:
    """Tensors or None."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(tensor).__name__}")


def refuse_later(**given: bool) -> None:
    """given: arguments whose kernels come later, and whether they have other values than the
    default."""
    names = ", ".join(name for name, is_given in given.items() if is_given)
    raise NotImplementedError(f"{names}: not implemented yet; leave the default")


def check_arguments(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> None:
    """What the compiled code cannot check: that it is given tensors and a number."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if softmax_scale is not None and isinstance(softmax_scale, (str, bytes, Tensor)):
        raise TypeError(f"softmax_scale: expected a number, got {type(softmax_scale).__name__}")


def window_of(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right) as the operator takes them. While tracing, sides may be symbolic integers,
    which the operator checks when it runs."""
    if not torch.compiler.is_compiling():
        if window_size is NO_WINDOW:
            return -1, 0 if causal else -1
        try:
            left, right = map(operator.index, window_size)
        except (TypeError, ValueError):
            left = right = -2
        if left < -1 or right < -1:
            raise ValueError(
                "window_size: expected (left, right), each a number of keys or -1 (unbounded), "
                f"got {window_size!r}"
            )
        return min(left, _UNBOUNDED), 0 if causal else min(right, _UNBOUNDED)
    left, right = window_size
    return left, 0 if causal else right


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own attention does."""
    device_type = "cuda" if q.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device_type) or q.device.type != device_type:
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    q, k, v = (tensor.to(dtype) if tensor.dtype in castable else tensor for tensor in (q, k, v))
    return q, k, v
