# SPDX-License-Identifier: BSD-3-Clause
"""Functions of queries that need not hold all of them, and derivatives of these of any order.

Attention of one query needs no other query. :class:`RowFunction` is a function with this property.
Its vector-Jacobian product, its Jacobian-vector product and its map over a new dimension have the
property too. Derivatives of any order are therefore computed in the same way, some queries at a
time, in memory that is linear in the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from flash_attn_cuda._transforms import per_element
from flash_attn_cuda.reference import sequence_rows

ROWS = 64  # queries whose scores are held at a time
_SEQUENCES = 4  # cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axes:
    """The dimensions of a tensor that are sequences, queries and keys; None is of all alike."""

    batch: int | None = None
    query: int | None = None
    key: int | None = None
    packed: bool = False  # are the rows of all sequences in it, or does each count from 0?

    def shifted(self) -> Axes:
        """Those of the tensor with another dimension before its first."""
        batch, query, key = (x if x is None else x + 1 for x in (self.batch, self.query, self.key))
        return Axes(batch, query, key, self.packed)

    def queries(self, tensor: Tensor) -> int:
        return 1 if self.query is None else tensor.shape[self.query]

    def of_rows(self, tensor: Tensor, first: int, rows: int) -> Tensor:
        return tensor if self.query is None else tensor.narrow(self.query, first, rows)

    def of_sequence(self, tensor: Tensor, index: int, rows_q: slice, rows_k: slice) -> Tensor:
        if self.batch is not None:
            tensor = tensor.narrow(self.batch, index, 1)
        for dim, rows in ((self.query, rows_q), (self.key, rows_k)):
            if dim is not None:
                length = rows.stop - rows.start
                tensor = tensor.narrow(dim, rows.start if self.packed else 0, length)
        return tensor


@dataclass(frozen=True)
class RowFunction:
    """Results that have queries are computed for some queries at a time, others summed over them.

    compute: (first query, number of queries in all, tensors of the queries from the first on) ->
        results of these queries. It is differentiable in the tensors after the constants.
    inputs, outputs: of the tensors, the constants first, and of the results.
    shapes: from the shapes of whole tensors to those of whole results.
    """

    compute: Callable[..., tuple[Tensor, ...]]
    constants: int
    inputs: tuple[Axes, ...]
    outputs: tuple[Axes, ...]
    shapes: Callable[[Sequence[Shape]], Sequence[Shape]]

    def vjp(self) -> RowFunction:
        """Of constants, inputs and cotangents of outputs; gives those of inputs."""
        constants, count = self.constants, len(self.inputs)

        def compute(first: int, total: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            function = partial(self.compute, first, total, *tensors[:constants])
            pull = torch.func.vjp(function, *tensors[constants:count])[1]
            return tuple(pull(tensors[count:]))

        inputs, outputs = self.inputs + self.outputs, self.inputs[constants:]
        return RowFunction(compute, constants, inputs, outputs, lambda x: x[constants:count])

    def jvp(self) -> RowFunction:
        """Of constants, inputs and tangents of inputs; gives those of outputs."""
        constants, count = self.constants, len(self.inputs)

        def compute(first: int, total: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            function = partial(self.compute, first, total, *tensors[:constants])
            # The pullback is linear in what it pulls back, and its own pullback is the derivative
            # (Townsend, 2017). torch.func.jvp cannot be asked: torch nests no forward mode in
            # torch.autograd.forward_ad, where this may run.
            results, pull = torch.func.vjp(function, *tensors[constants:count])[:2]
            push = torch.func.vjp(pull, tuple(torch.zeros_like(x) for x in results))[1]
            return tuple(push(tensors[count:])[0])

        inputs = self.inputs + self.inputs[constants:]
        return RowFunction(
            compute, constants, inputs, self.outputs, lambda x: self.shapes(x[:count])
        )

    def mapped(self, over: Sequence[bool], size: int) -> RowFunction:
        """Over a new first dimension, of this size, of some inputs and of all outputs."""
        dims = tuple(0 if is_mapped else None for is_mapped in over)

        def compute(first: int, total: int, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.func.vmap(partial(self.compute, first, total), dims)(*tensors))

        def shapes(of_tensors: Sequence[Shape]) -> Sequence[Shape]:
            pairs = zip(of_tensors, over, strict=True)
            of_one = [x[1:] if is_mapped else x for x, is_mapped in pairs]
            return [(size, *shape) for shape in self.shapes(of_one)]

        pairs = zip(self.inputs, over, strict=True)
        inputs = tuple(x.shifted() if is_mapped else x for x, is_mapped in pairs)
        outputs = tuple(axes.shifted() for axes in self.outputs)
        return RowFunction(compute, self.constants, inputs, outputs, shapes)

    def add_to(self, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """One padded batch, a few queries at a time."""
        total = self.inputs[self.constants].queries(tensors[self.constants])
        for first in range(0, total, ROWS):
            rows = min(ROWS, total - first)
            pairs = zip(self.inputs, tensors, strict=True)
            parts = self.compute(first, total, *(x.of_rows(y, first, rows) for x, y in pairs))
            for axes, result, part in zip(self.outputs, results, parts, strict=True):
                axes.of_rows(result, first, rows).add_(part)

    def __call__(self, sequences: Sequence[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results, in the dtype of the differentiable tensors.

        sequences: cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k; None of padded batches.
        """
        example = tensors[self.constants]
        results = tuple(example.new_zeros(x) for x in self.shapes([x.shape for x in tensors]))
        _refuse_linearize()
        cu_seqlens_q, cu_seqlens_k, used_q, used_k = sequences
        if cu_seqlens_q is None or cu_seqlens_k is None:
            self.add_to(results, tensors)
            return results
        both = (sequence_rows(cu_seqlens_q, used_q), sequence_rows(cu_seqlens_k, used_k))
        for index, rows in enumerate(zip(*both, strict=True)):

            def of_sequence(axes: Axes, x: Tensor, index: int = index, rows: Any = rows) -> Tensor:
                return axes.of_sequence(x, index, *rows)

            self.add_to(
                list(map(of_sequence, self.outputs, results)),
                list(map(of_sequence, self.inputs, tensors)),
            )
        return results


def _refuse_linearize() -> None:
    """Which folds what no tangent reaches, and does not see that results are written in place."""
    if get_proxy_mode() is not None and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.func.linearize and make_fx of flash_attn_cuda's derivatives beyond the first "
            "are not implemented: use torch.func.jvp"
        )


class _ByRows(torch.autograd.Function):
    """A RowFunction as autograd and torch.func know it."""

    @staticmethod
    def forward(function: RowFunction, *tensors: Any) -> tuple[Tensor, ...]:
        sequences, tensors = tensors[:_SEQUENCES], tensors[_SEQUENCES:]
        device_type = tensors[function.constants].device.type
        with torch.autocast(device_type, enabled=False):
            return function(sequences, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        gradients = by_rows(ctx.function.vjp(), *ctx.saved_tensors, *cotangents)
        return *(None,) * (1 + _SEQUENCES + ctx.function.constants), *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        tangents = tangents[1 + _SEQUENCES + ctx.function.constants :]
        return by_rows(ctx.function.jvp(), *ctx.saved_tensors, *tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: RowFunction, *tensors: Any
    ) -> tuple[Any, Any]:
        dims = in_dims[1:]
        if any(dim is not None for dim in dims[:_SEQUENCES]):
            return per_element(by_rows, info, in_dims, function, *tensors)
        pairs = zip(tensors, dims, strict=True)
        tensors = tuple(x if dim is None else x.movedim(dim, 0) for x, dim in pairs)
        over = [dim is not None for dim in dims[_SEQUENCES:]]
        results = by_rows(function.mapped(over, info.batch_size), *tensors)
        return results, (0,) * len(results)


def by_rows(function: RowFunction, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The function's results, differentiable any number of times.

    Args:
        function: of what follows.
        tensors: cu_seqlens_q, cu_seqlens_k, seqused_q and seqused_k, which are None of padded
            batches; the function's tensors.
    """
    apply: Callable[..., Any] = _ByRows.apply
    return apply(function, *tensors)  # type: ignore[no-any-return]
