# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of attention beyond its gradient: double backward and forward-mode AD.

They are derivatives of flash_attn_cuda.reference.attention_ref, which defines the rules and terms,
recomputed from q, k and v in float32 (float64 for float64), 64 queries at a time: memory is linear
in the sequence length. Results of the kernels, out and softmax_lse, are functions of q, k and v
here, so that no derivative refers to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn_cuda._row_functions import Axes, RowFunction, Shape, by_rows
from flash_attn_cuda._transforms import inside_torch_func
from flash_attn_cuda.reference import attention_ref

TERMS = ("attn_bias", "alibi_slopes", "sinks")

# Of the tensors after q, k and v of the general operators, in their order.
_NAMES = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "attn_bias", "attn_mask"),
    *("key_padding_mask", "block_mask", "document_ids", "prefix_lens", "alibi_slopes", "sinks"),
    "rng_state",
)
_OF_PAIRS = ("attn_bias", "attn_mask", "block_mask")
_ROWS_OF_Q, _ROWS_OF_K = Axes(query=1, packed=True), Axes(key=1, packed=True)
_LSE = Axes(query=2, packed=True)


@dataclass(frozen=True)
class Options:
    """What a call has beside tensors, as the operators take it."""

    softmax_scale: float | None
    window_left: int
    window_right: int
    softcap: float = 0.0
    dropout_p: float = 0.0


class Problem:
    """Attention of one call as a :class:`RowFunction` of q, k, v and of those terms that have
    derivatives.

    Args:
        q, k, v: as of the operators, of which packed sequences have batch 1.
        tensors: those that follow in the general operators; none of the plain ones.
        options: of the call.
        terms: those of TERMS that are known to have derivatives; others do where torch may ask for
            them later.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor | None],
        options: Options,
        terms: Sequence[str],
    ) -> None:
        if options.dropout_p != 0.0:
            raise NotImplementedError(
                "dropout_p: the gradient of flash_attn_cuda's gradient and forward-mode AD are not "
                f"implemented with dropout, got {options.dropout_p}; use "
                "flash_attn_cuda.reference.attention_ref, which has all derivatives"
            )
        named = zip(_NAMES, tensors, strict=False)
        given = {name: x for name, x in named if x is not None and name != "rng_state"}
        self.sequences: tuple[Tensor | None, ...] = (None,) * 4
        if "cu_seqlens_q" in given:
            self.sequences = tuple(given.pop(name, None) for name in _NAMES[:4])
        self.terms = [
            name
            for name in TERMS
            if name in given and (name in terms or _may_have_derivatives(given[name]))
        ]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.primals = [q, k, v, *(given.pop(name) for name in self.terms)]
        self.names = ["q", "k", "v", *self.terms]
        self.constants = [_in_full(name, x) for name, x in given.items()]
        names = [*given, *self.names]
        tensors_by_name = zip(names, [*given.values(), *self.primals], strict=True)
        self.attention = RowFunction(
            compute=_attention_of(names, options, self.dtype),
            constants=len(given),
            inputs=tuple(_axes_of(name, _in_full(name, x)) for name, x in tensors_by_name),
            outputs=(_ROWS_OF_Q, _LSE),
            shapes=_shapes_of(len(given)),
        )

    def cast(self, like_primals: Sequence[Tensor | None]) -> list[Tensor]:
        """These, or the cotangents or tangents of them, as the row functions take them."""
        return [
            _zeros(_in_full(name, primal).shape, primal, self.dtype)
            if x is None
            else _in_full(name, x).to(self.dtype)
            for name, primal, x in zip(self.names, self.primals, like_primals, strict=True)
        ]

    def apply(self, function: RowFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        """function: a derivative of the attention; tensors: what it has beside the primals."""
        primals = self.cast(self.primals)
        return by_rows(function, *self.sequences, *self.constants, *primals, *tensors)

    def like_primals(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Of q, k, v and the terms, in their shapes and dtypes."""
        return [
            x.reshape(primal.shape).to(primal.dtype)
            for primal, x in zip(self.primals, results, strict=True)
        ]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For the formulas of this module, which find these in ctx.saved_tensors."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0 or inside_torch_func():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def forward_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of out and softmax_lse. ctx has (q, k, v, out, softmax_lse, *tensors) and the options of the
    operator."""
    q, k, v, _, _, *tensors = ctx.saved_tensors
    of_terms = dict(zip(_NAMES, tangents[3 : 3 + len(tensors)], strict=False))
    options, _ = _read(tensors, ctx.options)
    terms = [name for name in TERMS if of_terms.get(name) is not None]
    problem = Problem(q, k, v, tensors, options, terms)
    moved = [*tangents[:3], *(of_terms[name] for name in problem.terms)]
    out, softmax_lse = problem.apply(problem.attention.jvp(), *problem.cast(moved))
    return out.to(q.dtype), softmax_lse


def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """inputs: of bwd or bwd_general."""
    count = len(_NAMES) if len(inputs) > 7 + len(_NAMES) else 0
    save(ctx, *inputs[:5], *inputs[7 : 7 + count])
    ctx.options = inputs[7 + count :]


def double_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of what bwd and bwd_general take, from those of dq, dk, dv, dbias, dslopes and dsinks."""
    dout, dlse, q, k, v, *tensors = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (7 + len(tensors) + len(ctx.options))
    if all(x is None for x in cotangents):
        return tuple(gradients)
    options, needed = _read(tensors, ctx.options)
    places = {name: 7 + _NAMES.index(name) for name in TERMS} if tensors else {}
    problem = Problem(q, k, v, tensors, options, [name for name in needed if needed[name]])
    of_terms = dict(zip(TERMS, cotangents[3:], strict=False))
    of_gradients = [
        *cotangents[:3],
        *(of_terms[name] if needed[name] else None for name in problem.terms),
    ]
    *results, gradients[0], of_dlse = problem.apply(
        problem.attention.vjp().vjp(),
        *_cotangents(problem, dout, dlse),
        *problem.cast(of_gradients),
    )
    gradients[1] = None if dlse is None else of_dlse
    for place, result in zip(
        (2, 3, 4, *(places[name] for name in problem.terms)),
        problem.like_primals(results),
        strict=True,
    ):
        gradients[place] = result
    return tuple(gradients)


def backward_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of dq, dk, dv and, of bwd_general, of dbias, dslopes and dsinks."""
    dout, dlse, q, k, v, *tensors = ctx.saved_tensors
    options, needed = _read(tensors, ctx.options)
    moved_terms = dict(zip(_NAMES, tangents[7 : 7 + len(tensors)], strict=False))
    terms = [name for name in needed if needed[name] or moved_terms[name] is not None]
    problem = Problem(q, k, v, tensors, options, terms)
    moved = [*tangents[2:5], *(moved_terms[name] for name in problem.terms)]
    of_dout = torch.zeros_like(dout) if tangents[0] is None else tangents[0]
    results = problem.apply(
        problem.attention.vjp().jvp(),
        *_cotangents(problem, dout, dlse),
        *problem.cast(moved),
        *_cotangents(problem, of_dout, tangents[1]),
    )
    of_q, of_k, of_v, *of_terms = problem.like_primals(results)
    by_name = dict(zip(problem.terms, of_terms, strict=True))
    return (
        of_q,
        of_k,
        of_v,
        *(by_name[name] if is_needed else None for name, is_needed in needed.items()),
    )


def _read(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Options, dict[str, bool]]:
    """Options, and which terms need gradients, from what the operators take after tensors."""
    if not tensors:
        return Options(*options[:3]), {}
    softcap, dropout_p, softmax_scale, left, right, _, _, *needed = options
    is_needed = dict(zip(TERMS, needed, strict=False))
    return Options(softmax_scale, left, right, softcap, dropout_p), is_needed


def _may_have_derivatives(x: Tensor) -> bool:
    """Inside torch.func a tensor does not tell whether an outer transform differentiates in it."""
    return x.requires_grad or inside_torch_func()


def _zeros(shape: Shape, like: Tensor, dtype: torch.dtype) -> Tensor:
    """In no memory."""
    return like.new_zeros((), dtype=dtype).expand(shape)


def _cotangents(problem: Problem, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    if dlse is None:
        batch, seqlen_q, heads, _ = dout.shape
        dlse = _zeros((batch, heads, seqlen_q), dout, problem.dtype)
    return dout.to(problem.dtype), dlse.to(problem.dtype)


def _in_full(name: str, x: Tensor) -> Tensor:
    """With all four dimensions where it broadcasts to pairs."""
    return x.reshape((1,) * (4 - x.dim()) + x.shape) if name in _OF_PAIRS else x


def _axes_of(name: str, x: Tensor) -> Axes:
    if name == "q":
        return _ROWS_OF_Q
    if name in ("k", "v"):
        return _ROWS_OF_K
    if name in _OF_PAIRS:
        # Blocks are found by the places of queries and keys.
        dims = (0,) if name == "block_mask" else (0, 2, 3)
        batch, query, key = (
            dim if dim in dims and x.shape[dim] != 1 else None for dim in (0, 2, 3)
        )
        return Axes(batch, query, key)
    if name == "sinks" or (name == "alibi_slopes" and x.dim() == 1):
        return Axes()
    return Axes(batch=0)


def _attention_of(names: Sequence[str], options: Options, dtype: torch.dtype) -> Any:
    window_size = (options.window_left, options.window_right)

    def compute(first: int, total: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = dict(zip(names, tensors, strict=True))
        q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
        return attention_ref(
            q,
            k,
            v,
            softmax_scale=options.softmax_scale,
            window_size=window_size,
            softcap=options.softcap,
            rows=range(first, first + q.shape[1]),
            seqlen_q=total,
            upcast=dtype,
            **arguments,
        )

    return compute


def _shapes_of(constants: int) -> Any:
    def shapes(of_tensors: Sequence[Shape]) -> list[Shape]:
        (batch, seqlen_q, heads, _), _, of_v = of_tensors[constants : constants + 3]
        return [(batch, seqlen_q, heads, of_v[3]), (batch, heads, seqlen_q)]

    return shapes
