# SPDX-License-Identifier: BSD-3-Clause
"""The operators: fake kernels, autograd, and the one entry point that the public functions call.

Eager calls with gradients go through an autograd.Function; the same formulas are registered on the
operator for torch.compile and torch.export, where the higher cost of registration is paid once,
while tracing. _transforms.py has the rules of torch.func.vmap, and _higher_order.py the derivatives
beyond the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn_cuda import _higher_order, _transforms
from flash_attn_cuda._load import load_extension

_C = load_extension()
_fwd = torch.ops.flash_attn_cuda.fwd.default
_bwd = torch.ops.flash_attn_cuda.bwd.default
_fwd_general = torch.ops.flash_attn_cuda.fwd_general.default
_bwd_general = torch.ops.flash_attn_cuda.bwd_general.default


def _without_frame(operator: Any) -> Any:
    """The operator without a Python frame before it, where this torch has that."""
    return getattr(operator, "_op", operator)


_fwd_eager = _without_frame(torch.ops.flash_attn_cuda.fwd_eager.default)
_bwd_eager = _without_frame(torch.ops.flash_attn_cuda.bwd_eager.default)
_fwd_general_eager = _without_frame(torch.ops.flash_attn_cuda.fwd_general_eager.default)
_bwd_general_eager = _without_frame(torch.ops.flash_attn_cuda.bwd_general_eager.default)

_dropout_mask = torch.ops.flash_attn_cuda.dropout_mask.default

# Of the general operators, after q, k and v: how many tensors follow, and which have gradients.
_TENSORS = 13
_BIAS, _SLOPES, _SINKS = 4, 10, 11

_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "NotImplementedError": NotImplementedError,
    "RuntimeError": RuntimeError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


def _raise_named(error: RuntimeError) -> NoReturn:
    """The compiled code prefixes a message with the exception that it stands for."""
    name, _, sentence = str(error).partition(": ")
    if name == "OutOfMemoryError" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # an earlier CUDA error fails allocations too, and is raised here
    if name in _ERRORS:
        raise _ERRORS[name](sentence) from None
    raise error


def _cuda_allows_tf32() -> bool:
    # The one question that knows all ways to set it, and warns of none.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result sets, which imports torch._dynamo: torch cannot trace
# the question, but traces again where the answer changes.
_cuda_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allows_tf32(q: Tensor) -> bool:
    """Whether products of such tensors may round their factors to TF32, as torch's own may."""
    return q.dtype is torch.float32 and q.is_cuda and _cuda_allows_tf32()


def statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What tracing and explain() must know; the compiled code checks everything when it runs."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (batch, seqlen, heads, head_dim), got "
                f"{tensor.dim()} in shape {tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q, got {tensor.device}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {tensor.dtype}")


@torch.library.register_fake("flash_attn_cuda::fwd")  # type: ignore[untyped-decorator]
@torch.library.register_fake("flash_attn_cuda::fwd_eager")  # type: ignore[untyped-decorator]
def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    deterministic: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_results(q, k, v)


@torch.library.register_fake("flash_attn_cuda::fwd_general")  # type: ignore[untyped-decorator]
@torch.library.register_fake("flash_attn_cuda::fwd_general_eager")  # type: ignore[untyped-decorator]
def _fwd_general_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_max_logit = options[-1]
    max_logit = q.new_empty(q.shape[2] if needs_max_logit else 0, dtype=statistics_dtype(q))
    return *_fake_results(q, k, v), max_logit


def _fake_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    check_alike(q, k, v)
    batch, seqlen_q, heads, _ = q.shape
    softmax_lse = q.new_empty((batch, heads, seqlen_q), dtype=statistics_dtype(q))
    return q.new_empty((batch, seqlen_q, heads, v.shape[3])), softmax_lse


@torch.library.register_fake("flash_attn_cuda::bwd")  # type: ignore[untyped-decorator]
@torch.library.register_fake("flash_attn_cuda::bwd_eager")  # type: ignore[untyped-decorator]
def _bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    deterministic: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("flash_attn_cuda::bwd_general")  # type: ignore[untyped-decorator]
@torch.library.register_fake("flash_attn_cuda::bwd_general_eager")  # type: ignore[untyped-decorator]
def _bwd_general_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    _, _, *tensors = options  # after out and softmax_lse
    of_terms = (
        q.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(_differentiable(tensors), options[-3:], strict=True)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *of_terms


def _differentiable(tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    return tensors[_BIAS], tensors[_SLOPES], tensors[_SINKS]


@torch.library.register_fake("flash_attn_cuda::dropout_mask")  # type: ignore[untyped-decorator]
def _dropout_mask_fake(
    rng_state: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    return rng_state.new_empty((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    _higher_order.save(ctx, q, k, v, *output)


def _gradients(
    run_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 8
    q, k, v, out, softmax_lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    *options, deterministic, allow_tf32 = ctx.options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    inputs = (q, k, v, out, softmax_lse, *options, deterministic, allow_tf32)
    dq, dk, dv = run_bwd(dout, dlse, *inputs)
    return dq, dk, dv, None, None, None, None, None


def _setup_general_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, v, *options = inputs
    out, softmax_lse, max_logit = output
    _higher_order.save(ctx, q, k, v, out, softmax_lse, *options[:_TENSORS])
    ctx.options = options[_TENSORS:]
    ctx.mark_non_differentiable(max_logit)


def _general_gradients(
    run_bwd: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
    dmax_logit: None = None,
) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * (3 + _TENSORS + len(ctx.options))
    if dout is None and dlse is None:
        return tuple(gradients)
    q, k, v, out, softmax_lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    *options, deterministic, allow_tf32, _ = ctx.options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    inputs = (*tensors, *options, deterministic, allow_tf32)
    needed = _differentiable(ctx.needs_input_grad[3:])
    *gradients[:3], dbias, dslopes, dsinks = run_bwd(
        dout, dlse, q, k, v, out, softmax_lse, *inputs, *needed
    )
    for index, gradient, is_needed in zip(
        (_BIAS, _SLOPES, _SINKS), (dbias, dslopes, dsinks), needed, strict=True
    ):
        gradients[3 + index] = gradient if is_needed else None
    return tuple(gradients)


# For torch.compile and torch.export.
torch.library.register_autograd(
    "flash_attn_cuda::fwd", partial(_gradients, _bwd), setup_context=_setup_context
)
torch.library.register_autograd(
    "flash_attn_cuda::bwd",
    _higher_order.double_backward,
    setup_context=_higher_order.setup_backward,
)
torch.library.register_autograd(
    "flash_attn_cuda::fwd_general",
    partial(_general_gradients, _bwd_general),
    setup_context=_setup_general_context,
)
torch.library.register_autograd(
    "flash_attn_cuda::bwd_general",
    _higher_order.double_backward,
    setup_context=_higher_order.setup_backward,
)
_transforms.register("flash_attn_cuda")


# For eager mode: without the autograd registered above, and errors get their own types.
class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _bwd_eager(*inputs)
        return dq, dk, dv

    setup_context = staticmethod(_higher_order.setup_backward)
    backward = staticmethod(_higher_order.double_backward)
    jvp = staticmethod(_higher_order.backward_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _transforms.attention(_Backward.apply, info, in_dims, *inputs)


class _Forward(torch.autograd.Function):
    """FlashAttention-2 (Dao, 2023), Algorithms 1 and 2. Each output costs the host time in both
    passes, so that out is the only one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        out, softmax_lse = _fwd_eager(*inputs)
        q, k, v, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, out, softmax_lse)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        run_bwd = _Backward.apply if _is_differentiated() else _bwd_eager
        try:
            return _gradients(run_bwd, ctx, dout, dlse)
        except RuntimeError as error:
            _raise_named(error)


class _ForwardWithLse(_Forward):
    """The same with gradients through the LSE too, and with all that torch.func and forward-mode AD
    demand."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _fwd_eager(*inputs)

    setup_context = staticmethod(_setup_context)
    jvp = staticmethod(_higher_order.forward_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _transforms.attention(_ForwardWithLse.apply, info, in_dims, *inputs)


class _GeneralBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _bwd_general_eager(*inputs)

    setup_context = staticmethod(_higher_order.setup_backward)
    backward = staticmethod(_higher_order.double_backward)
    jvp = staticmethod(_higher_order.backward_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _transforms.general_backward(_GeneralBackward.apply, info, in_dims, *inputs)


class _GeneralForward(torch.autograd.Function):
    """_ForwardWithLse with sequences, rules and terms, and with the gradients of these."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _fwd_general_eager(*inputs)

    setup_context = staticmethod(_setup_general_context)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_higher_order.forward_jvp(ctx, *tangents), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _transforms.general_forward(_GeneralForward.apply, info, in_dims, *inputs)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dmax_logit: None
    ) -> tuple[Tensor | None, ...]:
        run_bwd = _GeneralBackward.apply if _is_differentiated() else _bwd_general_eager
        try:
            return _general_gradients(run_bwd, ctx, dout, dlse)
        except RuntimeError as error:
            _raise_named(error)


def _apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """All that Function.apply() does outside torch.func, where this torch has it by itself: it
    takes longer to find out that there is nothing else to do."""
    apply: Callable[..., Any] = function.apply
    return getattr(super(torch.autograd.Function, function), "apply", apply)


_apply = _apply_of(_Forward)
_apply_with_lse = _apply_of(_ForwardWithLse)
_apply_transformed: Callable[..., Any] = _ForwardWithLse.apply
_apply_general: Callable[..., Any] = _GeneralForward.apply

# Names of this module are found sooner.
_inside_torch_func = _transforms.inside_torch_func
_is_grad_enabled = torch.is_grad_enabled


def _is_differentiated() -> bool:
    """Forward-mode AD does not heed torch.no_grad()."""
    return _is_grad_enabled() or forward_ad._current_level >= 0


def _traced_transform(*inputs: Any) -> Any:
    return _apply_transformed(*inputs)


def _traced_general_transform(*inputs: Any) -> Any:
    return _apply_general(*inputs)


def _traces_transforms() -> bool:
    """Whether torch.func or forward-mode AD differentiate or map what is being traced.

    Dynamo then takes the functions above into its graph as they are, and whoever runs the graph
    finds the autograd.Function with its rules, which an operator cannot have. torch.export, whose
    graphs have operators alone, exports no derivatives, and operators can be mapped.
    """
    if not _inside_torch_func() and forward_ad._current_level < 0:
        return False
    if torch.compiler.is_exporting():
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "torch.export of forward-mode AD through flash_attn_cuda is not implemented"
            )
        return False
    torch.compiler.allow_in_graph([_traced_transform, _traced_general_transform])  # type: ignore[no-untyped-call]
    return True


# As above: the answer is one for the whole graph.
_traces_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    deterministic: bool,
    return_lse: bool,
) -> Any:
    """Attention and, where asked for, its log-sum-exp; both are differentiable.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads.
        softmax_scale: factor of q @ k^T; None is head_dim ** -0.5.
        window_left, window_right: keys seen before and after the bottom-right aligned diagonal; -1
            is unbounded.
        deterministic: gradients are the same bits whenever they are computed.

    Returns:
        out, like q; with return_lse (out, softmax_lse), where softmax_lse is (batch, heads,
        seqlen_q), float32 (float64 for float64 inputs), natural log.
    """
    inputs = (q, k, v, softmax_scale, window_left, window_right, deterministic, allows_tf32(q))
    if torch.compiler.is_compiling():
        output = _traced_transform(*inputs) if _traces_transforms() else _fwd(*inputs)
        return output if return_lse else output[0]
    try:
        if forward_ad._current_level >= 0:
            output = _apply_transformed(*inputs)
        elif not _is_grad_enabled():
            output = _fwd_eager(*inputs)
        elif _inside_torch_func():
            output = _apply_transformed(*inputs)
        elif return_lse:
            output = _apply_with_lse(*inputs)
        else:
            return _apply(*inputs)
    except RuntimeError as error:
        _raise_named(error)
    return output if return_lse else output[0]


@dataclass(frozen=True)
class Terms:
    """What a call has beside sequences and rules; the defaults are none.

    alibi_slopes (heads,) or (batch, heads) and sinks (heads,) are of the dtype of softmax_lse.
    rng_state is (2,) int64, seed and offset, and there where dropout_p is above 0.
    """

    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    rng_state: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """In the order of the operator."""
        return self.alibi_slopes, self.sinks, self.rng_state, self.softcap, self.dropout_p


NO_TERMS = Terms()


def general_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: tuple[Tensor | None, ...],
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    deterministic: bool,
    terms: Terms = NO_TERMS,
    needs_max_logit: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over sequences, under rules and with terms, and its log-sum-exp.

    Args:
        q, k, v: as of :func:`attention`; packed sequences have batch 1 and the rows of all.
        tensors: cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, attn_bias, attn_mask,
            key_padding_mask, block_mask, document_ids, prefix_lens; None is without.
        softmax_scale, window_left, window_right, deterministic: as of :func:`attention`.
        terms: softcap, ALiBi, sinks and dropout.
        needs_max_logit: whether to find the largest score of each head.

    Returns:
        (out, softmax_lse, max_logit): the first two as of :func:`attention`, differentiable in q,
        k, v, attn_bias, alibi_slopes and sinks; max_logit (heads,) of the dtype of softmax_lse, or
        empty where nobody needs it.
    """
    options = (softmax_scale, window_left, window_right, deterministic, allows_tf32(q))
    inputs = (q, k, v, *tensors, *terms.inputs, *options, needs_max_logit)
    if torch.compiler.is_compiling():
        if _traces_transforms():
            return _traced_general_transform(*inputs)  # type: ignore[no-any-return]
        return _fwd_general(*inputs)  # type: ignore[no-any-return]
    try:
        if not _is_differentiated():
            return _fwd_general_eager(*inputs)  # type: ignore[no-any-return]
        return _apply_general(*inputs)  # type: ignore[no-any-return]
    except RuntimeError as error:
        _raise_named(error)


def general_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dslopes and dsinks by the operator bwd_general, not differentiable.

    Args:
        inputs: dout, dlse, q, k, v, out, softmax_lse; the tensors, the terms' inputs and what
            follows up to deterministic as of :func:`general_attention`; allows_tf32(q); whether
            dbias, dslopes and dsinks are wanted, which are empty else.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return _bwd_general(*inputs)  # type: ignore[no-any-return]
    try:
        return _bwd_general_eager(*inputs)  # type: ignore[no-any-return]
    except RuntimeError as error:
        _raise_named(error)


def dropout_mask(
    rng_state: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """Which probabilities dropout keeps: (batch, heads, seqlen_q, seqlen_k) bool."""
    try:
        return _dropout_mask(rng_state, dropout_p, batch, heads, seqlen_q, seqlen_k)  # type: ignore[no-any-return]
    except RuntimeError as error:
        _raise_named(error)
