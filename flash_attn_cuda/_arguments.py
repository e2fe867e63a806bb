# SPDX-License-Identifier: BSD-3-Clause
"""What the public functions share: checks that the compiled code cannot make, windows, autocast."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flash_attn_cuda import _ops

# A Tensor, or a tuple of them where the arguments ask for more than the output.
AttentionResult: TypeAlias = Tensor | Any

NO_WINDOW = (-1, -1)
_UNBOUNDED = 1 << 40  # more keys than any sequence has
_LARGEST = torch.iinfo(torch.int64).max


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


def terms_of(
    q: Tensor,
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> _ops.Terms:
    """What the operators take of these arguments, with a new state where there is dropout and
    none is given."""
    if alibi_slopes is sinks is None and dropout_p == softcap == 0.0:
        return _ops.NO_TERMS
    for name, number in (("dropout_p", dropout_p), ("softcap", softcap)):
        if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    check_optional(alibi_slopes=alibi_slopes, sinks=sinks, rng_state=rng_state)
    if dropout_p == 0.0:
        rng_state = None
    elif rng_state is None:
        rng_state = new_rng_state(q.device, generator)
    slopes, sinks = _as_statistics(q, alibi_slopes), _as_statistics(q, sinks)
    return _ops.Terms(slopes, sinks, rng_state, softcap, dropout_p)


def results_of(
    out: Tensor,
    softmax_lse: Tensor,
    max_logit: Tensor,
    probabilities: Tensor | None,
    return_lse: bool,
    return_max_logit: bool,
) -> AttentionResult:
    """probabilities: S_dmask, or None where nobody asks for flash-attn's tuple."""
    results: tuple[Tensor, ...] = (out,)
    if probabilities is not None:
        results = (out, softmax_lse, probabilities)
    elif return_lse:
        results = (out, softmax_lse)
    if return_max_logit:
        results = (*results, max_logit)
    return results if len(results) > 1 else out


def new_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Seed and offset of a call's dropout, (2,) int64 of non-negative numbers, from a generator;
    default: torch's own of the device. An operator of torch, so that CUDA graphs, checkpointing and
    torch.compile treat it as they treat any dropout."""
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one of {device} like q, got {generator.device}")
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.randint(_LARGEST, (2,), dtype=torch.int64, device=device, **options)


def _as_statistics(q: Tensor, tensor: Tensor | None) -> Tensor | None:
    """In the dtype of softmax_lse; the compiled code refuses float64 beside a q of less."""
    if tensor is None or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(_ops.statistics_dtype(q))


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
