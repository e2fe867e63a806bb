# SPDX-License-Identifier: BSD-3-Clause
"""Is a result as exact as its arithmetic allows? One error bound, element by element.

The bound follows a correct FlashAttention kernel through its roundings, in float64 (S, P, dS as in
the FlashAttention-2 paper; D = rowsum(dO * O) - dLSE). Each element of out, lse, dq, dk and dv has
its own bound, so that an error in a small element is not hidden by a large one elsewhere, and no
tolerance is chosen by hand. A comparison with what PyTorch's own low-precision attention gets wrong
is both looser (it misses roundings that should not be there) and noisier (a correct kernel fails it
by bad luck).

    python -m tests.support.compare '{"seqlen_q": 65, "dtype": "bfloat16"}'

repeats one case; a failing test prints this line.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_cuda import flash_attn_func
from flash_attn_cuda.reference import attention_ref, window_mask
from tests.support.cases import Case, Inputs, make_inputs
from tests.support.poison import poisoned_allocations


@dataclass(frozen=True)
class Arithmetic:
    """The precisions of a kernel, as unit roundoffs.

    compute: of scores, softmax and accumulators: float32 for inputs of up to 32 bits.
    storage: of results, and of P and dS where they are operands of a matrix product. The float32
        and float64 paths keep both in their compute precision.
    tiny: what a value of the storage dtype can lose where it underflows.
    flush: the same for P in the compute precision: exp2 flushes subnormal numbers to 0.
    """

    compute: float
    storage: float
    tiny: float
    flush: float = 2.0**-126


_FLOAT32 = 2.0**-24
_FLOAT64 = 2.0**-53
ARITHMETIC = {
    torch.bfloat16: Arithmetic(compute=_FLOAT32, storage=2.0**-8, tiny=2.0**-126),
    torch.float16: Arithmetic(compute=_FLOAT32, storage=2.0**-11, tiny=2.0**-25),
    torch.float32: Arithmetic(compute=_FLOAT32, storage=_FLOAT32, tiny=2.0**-126),
    # The float64 reference makes errors of the same size as the kernel: twice the roundoff.
    torch.float64: Arithmetic(
        compute=2 * _FLOAT64, storage=2 * _FLOAT64, tiny=2.0**-1000, flush=2.0**-1022
    ),
}

# A dot product of head_dim terms errs by head_dim roundoffs at most; scaling, subtracting the
# maximum, multiplying by log2(e) and rounding the LSE add a few roundoffs of the same magnitude.
DOT_EXTRA = 16
# exp2, the division by the softmax denominator, and the factors of the online softmax.
EXP_ROUNDOFFS = 8
# A sum over a sequence of n terms: roundings of a long sum are as good as independent, so it errs
# by about sqrt(n) / 3 roundoffs of the sum of magnitudes. Six standard deviations are allowed.
SUM_ROUNDOFFS = 4
SUM_ROUNDOFFS_PER_ROOT = 2


@dataclass(frozen=True)
class Expected:
    """Exact values of the five results, in float64, and how far a correct kernel may be off."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]


def expected_with_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Expected:
    """out and lse, and with dout dq, dk and dv, each with its bound.

    q, dout: (batch, seqlen_q, heads, head_dim); k, v: (batch, seqlen_k, heads_kv, head_dim);
    dlse: (batch, heads, seqlen_q). Results have the layout of the operator's results.
    """
    arithmetic = ARITHMETIC[q.dtype]
    u, eps, tiny = arithmetic.storage, arithmetic.compute, arithmetic.tiny
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    group = q.shape[2] // k.shape[2]
    gamma = eps * (q.shape[3] + DOT_EXTRA)
    sum_k = _sum_error(k.shape[1], eps)
    sum_q = _sum_error(q.shape[1] * group, eps)

    # (batch, heads, seqlen, head_dim) in float64 from here on.
    Q = q.double().transpose(1, 2)
    K = k.double().transpose(1, 2).repeat_interleave(group, dim=1)
    V = v.double().transpose(1, 2).repeat_interleave(group, dim=1)
    absQ, absK, absV = Q.abs(), K.abs(), V.abs()

    out, lse = attention_ref(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size
    )
    Out = out.transpose(1, 2)
    mask = window_mask(
        q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
    )
    visible = mask.double()
    finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
    P = torch.exp((scale * Q @ K.mT).masked_fill(~mask, -math.inf) - finite_lse[..., None])

    err_S = gamma * abs(scale) * absQ @ absK.mT
    err_lse = _row_sum(P * err_S)
    err_P = P * torch.expm1(err_S + err_lse + EXP_ROUNDOFFS * eps + sum_k)
    err_P = err_P + arithmetic.flush * visible
    bound_O = (
        u * Out.abs() + (u * P + err_P) @ absV + sum_k * P @ absV + tiny * (1 + _column_sum(absV))
    )
    # A row that sees no key is exactly 0: it is assigned, not computed.
    bound_O = bound_O.masked_fill((lse == -math.inf)[..., None], 0.0)
    bound_lse = err_lse[..., 0] + EXP_ROUNDOFFS * eps + sum_k + 4 * eps * finite_lse.abs()
    values = {"out": out, "lse": lse}
    bounds = {"out": bound_O.transpose(1, 2), "lse": bound_lse}
    if dout is None:
        return Expected(values, bounds)

    dO = dout.double().transpose(1, 2)
    absdO = dO.abs()
    dLSE = torch.zeros_like(lse) if dlse is None else dlse.double()
    dLSE = dLSE[..., None]
    D = _row_sum(dO * Out) - dLSE
    dP = dO @ V.mT
    dS = P * (dP - D)
    err_D = _row_sum(bound_O * absdO) + gamma * _row_sum(Out.abs() * absdO) + 2 * eps * dLSE.abs()
    err_dP = gamma * absdO @ absV.mT
    err_dS = P * (err_dP + err_D) + err_P * (dP - D).abs()
    err_dS = err_dS + u * (dS.abs() + err_dS)
    err_dS = err_dS + tiny * visible  # a masked key contributes exactly 0

    def dq_like(dS: Tensor) -> Tensor:
        return (scale * dS @ K).transpose(1, 2)

    values["dq"] = dq_like(dS)
    values["dk"] = _sum_group(scale * dS.mT @ Q, group)
    values["dv"] = _sum_group(P.mT @ dO, group)
    # Queries and keys with nothing to add up are exactly 0 as well.
    tiny_dQ = tiny * _any(visible, dim=1)
    tiny_dK = tiny * _any(visible, dim=0)
    bound_dQ = (1 + u) * abs(scale) * (err_dS + sum_k * dS.abs()) @ absK + tiny_dQ
    bound_dK = (1 + u) * abs(scale) * (err_dS + sum_q * dS.abs()).mT @ absQ + tiny_dK
    weight = u * P + err_P + sum_q * P + tiny * visible
    bound_dV = (1 + u) * weight.mT @ absdO + tiny_dK
    bounds["dq"] = bound_dQ.transpose(1, 2) + u * values["dq"].abs()
    bounds["dk"] = _sum_group(bound_dK, group) + u * values["dk"].abs()
    bounds["dv"] = _sum_group(bound_dV, group) + u * values["dv"].abs()
    return Expected(values, bounds)


def assert_within_bound(
    name: str, actual: Tensor, expected: Tensor, bound: Tensor, repeat: str = ""
) -> None:
    """Every element of `actual` is within its bound of `expected`; NaN and -inf are where they
    belong."""
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}\n{repeat}"
        )
    if actual.numel() == 0:
        return
    actual = actual.detach().double()
    same_infinity = (actual == expected) & actual.isinf()
    # Written so that NaN on either side is a violation.
    inside = same_infinity | ((actual - expected).abs() <= bound)
    if inside.all():
        return
    excess = ((actual - expected).abs() / bound).masked_fill(inside, -1.0)
    excess = excess.nan_to_num(nan=math.inf, posinf=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}: {int((~inside).sum())} of {inside.numel()} elements are outside the error bound; "
        f"worst at {worst}: got {actual[worst].item():.9g}, expected {expected[worst].item():.9g}, "
        f"difference {(actual[worst] - expected[worst]).abs().item():.3g}, "
        f"bound {bound[worst].item():.3g}\n{repeat}"
    )


@dataclass(frozen=True)
class Results:
    """What the package returned for one case; the gradients are None after a forward pass alone."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def run(case: Case, inputs: Inputs, *, backward: bool) -> Results:
    """The package's results, computed in memory that was NaN before."""
    q, k, v = (x.detach().requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v))
    with poisoned_allocations():
        out, lse = flash_attn_func(
            q, k, v, deterministic=case.deterministic, return_lse=True, **case.mask_arguments
        )
        if not backward:
            return Results(out, lse)
        results, gradients = [out], [inputs.dout]
        if inputs.dlse is not None:
            results.append(lse)
            gradients.append(inputs.dlse)
        return Results(out, lse, *torch.autograd.grad(results, (q, k, v), gradients))


def check(case: Case, *, backward: bool) -> Results:
    """Run one case and hold every element of its results against the bound."""
    repeat = f"repeat with: {case.command()}"
    inputs = make_inputs(case)
    results = run(case, inputs, backward=backward)
    try:
        inputs.check_untouched()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{repeat}") from None
    expected = expected_with_bounds(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.dout if backward else None,
        inputs.dlse,
        **case.mask_arguments,
    )
    for name, value in expected.values.items():
        actual = getattr(results, name)
        _assert_dtype(name, actual, case, repeat)
        assert_within_bound(name, actual, value, expected.bounds[name], repeat)
    return results


def assert_bitwise_equal(name: str, actual: Tensor, expected: Tensor, repeat: str = "") -> None:
    """Same bits, NaN included."""
    different = actual.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    if different.any():
        first = int(different.flatten().nonzero()[0]) // actual.element_size()
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), actual.shape))
        raise AssertionError(
            f"{name} differs, first at {at}: {actual[at].item()!r} and {expected[at].item()!r}"
            f"\n{repeat}"
        )


def _assert_dtype(name: str, actual: Tensor, case: Case, repeat: str) -> None:
    dtype = case.torch_dtype
    if name == "lse" and dtype != torch.float64:
        dtype = torch.float32
    if actual.dtype != dtype:
        raise AssertionError(f"{name} is {actual.dtype}, expected {dtype}\n{repeat}")


def _sum_error(terms: int, eps: float) -> float:
    return eps * (SUM_ROUNDOFFS + SUM_ROUNDOFFS_PER_ROOT * math.sqrt(terms))


def _any(visible: Tensor, dim: int) -> Tensor:
    """1 for each row (dim 1) or column (dim 0) with a visible element, as a column vector."""
    return (visible.sum(dim) > 0).double()[:, None]


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(dim=-1, keepdim=True)


def _column_sum(x: Tensor) -> Tensor:
    return x.sum(dim=-2, keepdim=True)


def _sum_group(x: Tensor, group: int) -> Tensor:
    """(batch, heads, seqlen, head_dim) -> (batch, seqlen, heads_kv, head_dim), summed."""
    return x.unflatten(1, (x.shape[1] // group, group)).sum(dim=2).transpose(1, 2)


if __name__ == "__main__":
    repeated = Case.from_json(sys.argv[1])
    check(repeated, backward=True)
    sys.stdout.write(f"within the bound: {repeated}\n")
