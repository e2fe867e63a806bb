# SPDX-License-Identifier: BSD-3-Clause
"""torch.func.vmap: the mapped dimension joins the batch, so that all its elements are one call.

What cannot join it is one call for each element: packed sequences, whose batch is in cu_seqlens;
sinks that are mapped or need a gradient, and the largest scores, which have no batch; and dropout,
whose decisions depend on the place in the batch. A rule takes what torch.library.register_vmap
documents, after the function to call: the operator, or the autograd.Function of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Where torch lacks this question, the slower way that is right serves all calls.
inside_torch_func: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)

Call = Callable[..., Any]
Dims = Sequence[int | None]
Mapped = tuple[Any, Any]

# Places among the tensors after q, k and v of the general operators.
_CU_SEQLENS_Q, _BIAS, _MASK, _BLOCKS, _SLOPES, _SINKS, _RNG_STATE = 0, 4, 5, 7, 10, 11, 12
_TENSORS = 13
_PAIR_DIMS = 4
# How many dimensions those have that may lack the first of them, the batch.
_FULL = {_BIAS: _PAIR_DIMS, _MASK: _PAIR_DIMS, _BLOCKS: _PAIR_DIMS, _SLOPES: 2}


def per_element(call: Call, info: Any, in_dims: Dims, *inputs: Any) -> Mapped:
    """The rule that is right for every function."""
    # Of no elements, one of zeros tells the shapes.
    results = [
        call(*(_element(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(max(info.batch_size, 1))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[: info.batch_size], 0
    stacked = (torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
    return tuple(stacked), (0,) * len(results[0])


def attention(call: Call, info: Any, in_dims: Dims, *inputs: Any) -> Mapped:
    """The rule of fwd and bwd, whose tensors all have the batch first."""
    folded = (
        _fold(x, dim, info.batch_size) if isinstance(x, Tensor) else x
        for x, dim in zip(inputs, in_dims, strict=True)
    )
    batch = _batch(inputs[0], in_dims[0])
    results = tuple(_unfold(x, info.batch_size, batch) for x in call(*folded))
    return results, (0,) * len(results)


def general_forward(call: Call, info: Any, in_dims: Dims, *inputs: Any) -> Mapped:
    """The rule of fwd_general."""
    tensors, needs_max_logit = inputs[3 : 3 + _TENSORS], inputs[-1]
    of_sinks = in_dims[3 + _SINKS]
    if needs_max_logit or of_sinks is not None or not _fold_alike(tensors):
        return per_element(call, info, in_dims, *inputs)
    size, batch = info.batch_size, _batch(inputs[0], in_dims[0])
    rows = zip(inputs[:3], in_dims[:3], strict=True)
    out, softmax_lse, max_logit = call(
        *(_fold(x, dim, size) for x, dim in rows),
        *_fold_tensors(tensors, in_dims[3:], size, batch, {}),
        *inputs[3 + _TENSORS :],
    )
    of_both = (_unfold(x, size, batch) for x in (out, softmax_lse))
    return (*of_both, max_logit), (0, 0, None)


def general_backward(call: Call, info: Any, in_dims: Dims, *inputs: Any) -> Mapped:
    """The rule of bwd_general."""
    tensors, needs = inputs[7 : 7 + _TENSORS], inputs[-3:]
    needs_dbias, needs_dslopes, needs_dsinks = needs
    of_sinks = in_dims[7 + _SINKS]
    if needs_dsinks or of_sinks is not None or not _fold_alike(tensors):
        return per_element(call, info, in_dims, *inputs)
    size, dims = info.batch_size, in_dims[7:]
    batch = _batch(inputs[2], in_dims[2])
    wanted = {_BIAS: needs_dbias, _SLOPES: needs_dslopes}
    rows = zip(inputs[:7], in_dims[:7], strict=True)
    *of_rows, dbias, dslopes, dsinks = call(
        *(x if x is None else _fold(x, dim, size) for x, dim in rows),
        *_fold_tensors(tensors, dims, size, batch, wanted),
        *inputs[7 + _TENSORS :],
    )
    of_terms = [
        _unfold_gradient(gradient, tensors[index], dims[index], size, batch, _FULL[index])
        if is_wanted
        else gradient
        for gradient, (index, is_wanted) in zip((dbias, dslopes), wanted.items(), strict=True)
    ]
    out_dims = (0 if is_wanted else None for is_wanted in wanted.values())
    results = (*(_unfold(x, size, batch) for x in of_rows), *of_terms, dsinks)
    return results, (0, 0, 0, *out_dims, None)


def register(namespace: str) -> None:
    """Gives these rules to the operators, and to their eager twins for calls without gradients."""
    rules = {
        "fwd": attention,
        "bwd": attention,
        "fwd_general": general_forward,
        "bwd_general": general_backward,
    }
    operators = getattr(torch.ops, namespace)
    for name, rule in rules.items():
        for twin in (name, f"{name}_eager"):
            _register_one(f"{namespace}::{twin}", rule, getattr(operators, twin).default)
    _register_one(f"{namespace}::dropout_mask", per_element, operators.dropout_mask.default)


def _register_one(name: str, rule: Callable[..., Mapped], operator: Call) -> None:
    def mapped(info: Any, in_dims: Dims, *inputs: Any) -> Mapped:
        return rule(operator, info, in_dims, *inputs)

    torch.library.register_vmap(name, mapped)


def _fold_alike(tensors: Sequence[Any]) -> bool:
    return tensors[_CU_SEQLENS_Q] is None and tensors[_RNG_STATE] is None


def _element(x: Any, dim: int | None, index: int) -> Any:
    if dim is None:
        return x
    if x.shape[dim] == 0:
        return x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :])
    return x.select(dim, index)


def _batch(x: Tensor, dim: int | None) -> int:
    """Of each element, whose first dimension is the batch."""
    return x.shape[0 if dim is None or dim > 0 else 1]


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """(batch, ...) of each element -> (size * batch, ...), a view where there can be one."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if x.dim() > 1 else x


def _unfold(x: Tensor, size: int, batch: int) -> Tensor:
    return x.reshape(size, batch, *x.shape[1:])


def _fold_tensors(
    tensors: Sequence[Any], dims: Dims, size: int, batch: int, wanted: dict[int, bool]
) -> list[Any]:
    """wanted: by place, whether a gradient is wanted, of each element by itself."""
    folded = list(tensors)
    for index, (x, dim) in enumerate(zip(tensors, dims[:_TENSORS], strict=True)):
        if x is None or index == _SINKS:
            continue
        if index in _FULL:
            alone = wanted.get(index, False)
            folded[index] = _fold_broadcast(x, dim, size, batch, _FULL[index], alone)
        else:
            folded[index] = _fold(x, dim, size)
    return folded


def _fold_broadcast(
    x: Tensor, dim: int | None, size: int, batch: int, full: int, alone: bool
) -> Tensor:
    """What may lack the first of its `full` dimensions, the batch, or have 1 there.

    alone: whether each element needs its own, though all are equal.
    """
    lacks_batch = _lacks_batch(x, dim, full)
    if dim is None and lacks_batch and not alone:
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    x = x.reshape(size, *(1,) * (full + 1 - x.dim()), *x.shape[1:])
    if lacks_batch:
        x = x.expand(size, batch, *x.shape[2:])
    return x.flatten(0, 1)


def _unfold_gradient(
    gradient: Tensor, x: Tensor, dim: int | None, size: int, batch: int, full: int
) -> Tensor:
    """Of x, from that of what _fold_broadcast made of it."""
    gradient = _unfold(gradient, size, batch)
    if _lacks_batch(x, dim, full):
        gradient = gradient.sum(1)
    shape = list(x.shape)
    if dim is not None:
        del shape[dim]
    return gradient.reshape(size, *shape)


def _lacks_batch(x: Tensor, dim: int | None, full: int) -> bool:
    if x.dim() - (dim is not None) < full:
        return True
    return full == _PAIR_DIMS and x.shape[0 if dim is None or dim > 0 else 1] == 1
