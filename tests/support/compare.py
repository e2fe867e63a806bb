# SPDX-License-Identifier: BSD-3-Clause
"""Is a result as exact as its arithmetic allows? One error bound, element by element.

The bound follows a correct FlashAttention kernel through its roundings, in float64 (S, P, dS as in
the FlashAttention-2 paper; D = rowsum(dO * O) - dLSE). Each element of out, lse, dq, dk, dv, dbias,
dslopes, dsinks and max_logit has its own bound, so that an error in a small element is not hidden
by a large one elsewhere, and no tolerance is chosen by hand. A comparison with what PyTorch's own
low-precision attention gets wrong is both looser (it misses roundings that should not be there) and
noisier (a correct kernel fails it by bad luck).

A bound on the worst roundings grows with the number of terms, so an error has to be found where
terms are few: one key that dq alone lacks shows among hundreds of keys, not among thousands. Of the
results, lse is the sharpest, and shows a key that the forward pass lacks among thousands.
tests/python/test_error_bound.py tells what is found.

    python -m tests.support.compare '{"seqlen_q": 65, "dtype": "bfloat16"}'

repeats one case; a failing test prints this line.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flash_attn_cuda
from flash_attn_cuda import flash_attn_func, lowlevel
from flash_attn_cuda.reference import keep_probability, visible_pairs
from tests.support.cases import Case, Inputs, make_inputs
from tests.support.poison import poisoned_allocations


@dataclass(frozen=True)
class Arithmetic:
    """The precisions of a kernel, as unit roundoffs.

    compute: of scores, softmax and accumulators: float32 for inputs of up to 32 bits.
    storage: of results, and of P and dS where they are operands of a matrix product. The float32
        and float64 paths keep both in their compute precision.
    tiny: what a value of the storage dtype can lose where it underflows.
    flush: the same in the compute precision, for P and the sums of dq: on the GPU exp2 flushes
        subnormal numbers to 0, and so do additions to memory.
    factors: what products lose, relative to the product, where both factors are rounded.
    """

    compute: float
    storage: float
    tiny: float
    flush: float = 2.0**-126
    factors: float = 0.0


# How large unnormalized probabilities may be (kSlack of device/speculative_softmax.cuh) when a
# factor that flushes to 0 rescales them.
_SLACK = 2.0**8

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

# float32 whose factors tensor cores take as TF32. Split into two TF32 parts each, they lose a few
# roundoffs of float32 at worst, which the constants below have room for.
TF32 = Arithmetic(compute=_FLOAT32, storage=_FLOAT32, tiny=2.0**-126, factors=2.0**-10)

# The constants of the bound, in unit roundoffs. They are reasoned, and then measured: over
# thousands of problems, `python -m tests.calibrate_error_bound` takes the ratio |error| / bound of
# all elements and of those where the term of one constant is at least half of the bound.
# * No ratio may reach 1.
# * For the constants of float32 arithmetic, which are estimates, the largest ratio where the term
#   prevails should lie within CALIBRATED. Below, the constant is loose and could hide an error;
#   above, other data may violate the bound. OPERAND and RESULT are no estimates: rounding to
#   nearest errs by up to one roundoff and no more, so results that are rounded once or twice come
#   close to their bound, and the limit is 1.
# The kernels of all devices share the constants, so the least exact of them counts: for sums, and
# so for the softmax, that is the CPU's, which adds all terms in one chain.
CALIBRATED = (0.2, 0.8)

# q k^T and dout v^T over head_dim, of the sum of magnitudes: each addition rounds a partial sum,
# which is no larger, so the sum errs by head_dim roundoffs at most. A tensor core truncates, by up
# to two roundoffs, but once for 8 or 16 terms. All roundings at their worst are rare: there is
# room.
DOT_ROUNDOFFS_PER_TERM = 1
# The same, once per score: the scale and log2(e) as float32, their product, its product with the
# maximum or the LSE, and the difference. They are proportional to the scores, not to head_dim.
DOT_ROUNDOFFS = 16
# Once per score, of its bias: log2(e) as float32, the product with it, the sum with the score, and
# the difference with the maximum or the LSE.
BIAS_ROUNDOFFS = 4
# Once per slope's product with a distance, alike, and per sink: rounded as a bias is.
# Once per score, of what softcap makes of it: dividing by the cap, tanh to a few ulp, and the
# product with the cap. Of the derivative, 1 - tanh^2, absolute: three operations.
SOFTCAP_ROUNDOFFS = 12
DERIVATIVE_ROUNDOFFS = 3
# Dropout's factor, as float32, and the product with it.
DROPOUT_ROUNDOFFS = 2
# exp2 on the GPU errs by 2 ulp: 4. The base of the online softmax is up to 8 octaves below the
# maximum, and an exponent between 4 and 8 is rounded by up to 2^-22 octaves: 2.8. The rounding of
# an exponent below that is one of the scores'. Dividing by the denominator rounds twice: 2. Factors
# that rescale what was summed before apply to no more than 1 / 256 of the denominator.
EXP_ROUNDOFFS = 10
# Of an LSE: storing it, and adding the logarithm of the denominator to the base. The logarithm, to
# 1 ulp, may be larger than the LSE; the allowance for the sum that it is taken of covers that.
LSE_ROUNDOFFS = 4
# A sum of n terms over the sequence in any order, of the sum of magnitudes. Roundings of a long sum
# are as good as independent: about sqrt(n) / 3 roundoffs. Six standard deviations are allowed.
SUM_ROUNDOFFS = 4
SUM_ROUNDOFFS_PER_ROOT = 2
# But where terms are equal, as those of equal keys are, all additions between two powers of two err
# alike, by up to half a unit. In all that is n / 3 roundoffs, more than the above from 36 terms on.
# What a truncating tensor core loses, a roundoff on average for 8 or 16 terms, is less.
SUM_ROUNDOFFS_PER_TERM = 1 / 3
# P and dS as operands, and the results: one rounding to the storage dtype each, in its roundoffs.
OPERAND_ROUNDOFFS = 1
RESULT_ROUNDOFFS = 1


@dataclass(frozen=True)
class Constants:
    """The constants above; the calibration leaves out some to see what the others make up."""

    dot_per_term: float = DOT_ROUNDOFFS_PER_TERM
    dot: float = DOT_ROUNDOFFS
    bias: float = BIAS_ROUNDOFFS
    softcap: float = SOFTCAP_ROUNDOFFS
    derivative: float = DERIVATIVE_ROUNDOFFS
    dropout: float = DROPOUT_ROUNDOFFS
    exp: float = EXP_ROUNDOFFS
    lse: float = LSE_ROUNDOFFS
    sum: float = SUM_ROUNDOFFS
    sum_per_root: float = SUM_ROUNDOFFS_PER_ROOT
    sum_per_term: float = SUM_ROUNDOFFS_PER_TERM
    operand: float = OPERAND_ROUNDOFFS
    result: float = RESULT_ROUNDOFFS

    def of_dot(self, head_dim: int) -> float:
        return self.dot_per_term * head_dim + self.dot

    def of_sum(self, terms: Tensor) -> Tensor:
        return self.sum + torch.maximum(self.sum_per_root * terms.sqrt(), self.sum_per_term * terms)


CONSTANTS = Constants()

# Scores that are held at a time, in each of about 20 float64 matrices.
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Expected:
    """Exact values of the results, in float64, and how far a correct kernel may be off."""

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
    attn_bias: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
    max_logit: bool = False,
    constants: Constants = CONSTANTS,
    max_scores: int = MAX_SCORES,
    tf32: bool = False,
    **visibility: Any,
) -> Expected:
    """out, lse and, if asked for, max_logit, and with dout dq, dk, dv and, where there is something
    that they are the gradients of, dbias, dslopes and dsinks, each with its bound.

    q: (batch, seqlen_q, heads, head_dim); k: (batch, seqlen_k, heads_kv, head_dim); v: the same
    with head_dim_v; dout: (batch, seqlen_q, heads, head_dim_v); dlse: (batch, heads, seqlen_q);
    attn_bias, softcap, alibi_slopes, sinks, dropout_p, kept and `visibility`: as for
    `attention_ref`. Results have the layout of the operator's
    results. Queries are taken in parts of at most max_scores scores. tf32: as of Case.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, group = k.shape[1], heads // k.shape[2]
    arithmetic = TF32 if tf32 else ARITHMETIC[q.dtype]
    eps, tiny = arithmetic.compute, arithmetic.tiny
    u_operand = constants.operand * arithmetic.storage + arithmetic.factors
    u_result = constants.result * arithmetic.storage
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    gamma, gamma_v = (eps * constants.of_dot(x.shape[3]) + arithmetic.factors for x in (k, v))
    exp_error = eps * constants.exp
    # (batch or 1, heads or 1, seqlen_q, seqlen_k)
    mask = visible_pairs(seqlen_q, seqlen_k, device=q.device, **visibility)
    if attn_bias is not None:
        bias = attn_bias.detach().double()
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        mask = mask & (bias != -math.inf)
        bias_shape = bias.shape
        bias = bias.expand(batch, heads, seqlen_q, seqlen_k).masked_fill(~mask, 0.0)
    seeing, seen = (mask.any(dim)[..., None] for dim in (3, 2))
    exists, distances = _places(seqlen_q, seqlen_k, q.device, visibility)
    slopes = None if alibi_slopes is None else alibi_slopes.detach().double()[..., None, None]
    sink = None if sinks is None else sinks.detach().double()[:, None]  # (heads, 1)
    eps_drop = eps * constants.dropout
    drop_scale = 1.0
    if kept is not None:
        drop_scale = 1 / (keep_probability(dropout_p) or math.inf)
    # Of the terms that are not masked: adding 0 is exact.
    seen_by = mask.sum(dim=2).double()
    seen_by = seen_by * group if mask.shape[1] == 1 else _of_group(seen_by, group)
    sum_q = eps * constants.of_sum(seen_by)[:, :, None]

    # (batch, heads, seqlen, head_dim) in float64 from here on.
    K, V = (
        x.double().transpose(1, 2).repeat_interleave(group, dim=1).masked_fill(~seen, 0.0)
        for x in (k, v)
    )
    absK, absV = K.abs(), V.abs()

    def of_queries(rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """out, lse and dq of these queries; what they add to dk and dv, per head of queries, and
        to dbias, before it is summed over queries."""
        is_foreign = ~seeing[:, :, rows]
        Q = q[:, rows].double().transpose(1, 2).masked_fill(is_foreign, 0.0)
        absQ = Q.abs()
        visible = mask[:, :, rows].double()  # a masked key contributes exactly 0
        terms = _row_sum(visible)
        sum_k = eps * constants.of_sum(terms)
        S = scale * Q @ K.mT
        err_S = gamma * abs(scale) * absQ @ absK.mT
        if softcap != 0.0:
            T = torch.tanh(S / softcap)
            derivative = 1 - T.square()
            S = softcap * T
            # The second derivative is at most 0.77 / softcap.
            err_S = err_S * derivative + 0.77 / softcap * err_S.square()
            err_S += eps * constants.softcap * S.abs()
            err_derivative = 2 * T.abs() * err_S / softcap + eps * constants.derivative
        if slopes is not None:
            of_slopes = slopes * distances[:, :, rows]
            S = S - of_slopes
            err_S = err_S + eps * constants.bias * of_slopes.abs()
        if attn_bias is not None:
            S += bias[:, :, rows]
            err_S += eps * constants.bias * bias[:, :, rows].abs()
        S = S.masked_fill_(~mask[:, :, rows], -math.inf)
        values, bounds = {}, {}
        if max_logit and S.numel() > 0:
            largest = torch.stack([S, S + err_S, S - err_S]).amax(dim=(1, 3, 4))
            values["max_logit"], bounds["upper"], bounds["lower"] = largest
        lse = torch.logsumexp(S, dim=-1)
        sees_nothing = (lse == -math.inf)[..., None]
        if sink is not None:
            lse = torch.logaddexp(lse, sink.masked_fill(~exists[:, :, rows], -math.inf))
        finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
        P = torch.exp(S.sub_(finite_lse[..., None]))
        M = visible if kept is None else drop_scale * kept[:, :, rows].double()
        Out = (P * M) @ V

        err_lse = _row_sum(P * err_S)
        if sink is not None:
            of_sink = sink.masked_fill(sink == -math.inf, 0.0)
            err_lse = err_lse + eps * constants.bias * of_sink.abs()[..., None]
        err_P = P * torch.expm1(err_S + err_lse + exp_error + sum_k)
        err_P = err_P + _SLACK * arithmetic.flush * visible
        bound_O = (
            u_result * Out.abs()
            + ((u_operand * P + err_P) * M) @ absV
            + ((sum_k + eps_drop) * P * M) @ absV
            + tiny * (1 + max(1.0, drop_scale) * _column_sum(absV))
        )
        # A row that sees no key is exactly 0: it is assigned, not computed.
        bound_O = bound_O.masked_fill(sees_nothing, 0.0)
        bound_lse = (err_lse + exp_error + sum_k)[..., 0] + eps * constants.lse * finite_lse.abs()
        values |= {"out": Out.transpose(1, 2), "lse": lse}
        bounds |= {"out": bound_O.transpose(1, 2), "lse": bound_lse}
        if dout is None:
            return values, bounds

        dO = dout[:, rows].double().transpose(1, 2).masked_fill(is_foreign, 0.0)
        absdO = dO.abs()
        dLSE = torch.zeros_like(lse) if dlse is None else dlse[..., rows].double()
        # What reaches the LSE of a row that sees no key reaches its sink.
        reaches_nothing = is_foreign if sink is None else ~exists[:, :, rows, None]
        dLSE = dLSE[..., None].masked_fill(reaches_nothing, 0.0)
        D = _row_sum(dO * Out) - dLSE
        dP = (dO @ V.mT) * M
        dP_minus_D = dP - D
        dS = P * dP_minus_D
        err_D = _row_sum(bound_O * absdO) + gamma_v * _row_sum(Out.abs() * absdO)
        err_D = err_D + 2 * eps * dLSE.abs()
        err_dP = (gamma_v + eps_drop) * (absdO @ absV.mT) * M
        err_dS = P * (err_dP + err_D) + err_P * dP_minus_D.abs()
        if attn_bias is not None:
            shape = (*bias_shape[:2], dS.shape[2], bias_shape[3])
            values["dbias"] = _sum_to(dS, shape)
            # Of dS as it is before it becomes an operand.
            bounds["dbias"] = _sum_to(err_dS + arithmetic.flush * visible, shape)
            bounds["|dbias|"] = _sum_to(dS.abs(), shape)
        if slopes is not None:
            values["dslopes"] = -_head_sum(dS * distances[:, :, rows])
            bounds["dslopes"] = _head_sum(
                (err_dS + arithmetic.flush * visible) * distances[:, :, rows]
            )
            bounds["|dslopes|"] = _head_sum(dS.abs() * distances[:, :, rows])
        if sink is not None:
            P_sink = torch.exp(sink - finite_lse).masked_fill(~exists[:, :, rows], 0.0)[..., None]
            err_sink = constants.bias * (of_sink.abs() + finite_lse.abs())[..., None]
            err_sink = P_sink * torch.expm1(bound_lse[..., None] + exp_error + eps * err_sink)
            values["dsinks"] = -_head_sum(P_sink * D)
            bounds["dsinks"] = _head_sum(
                P_sink * err_D + (err_sink + arithmetic.flush * (P_sink > 0)) * D.abs()
            )
            bounds["|dsinks|"] = _head_sum((P_sink * D).abs())
        if softcap != 0.0:
            err_dS = err_dS * derivative + dS.abs() * err_derivative
            dS = dS * derivative
        err_dS = err_dS + u_operand * (dS.abs() + err_dS)
        err_dS = err_dS + tiny * visible

        values["dq"] = (scale * dS @ K).transpose(1, 2)
        values["dk"] = scale * dS.mT @ Q
        values["dv"] = (P * M).mT @ dO
        more = (1 + u_result) * abs(scale)
        # dq alone is summed in memory, before it is scaled. An addition there flushes a term or the
        # sum, not both, and there are no more additions than terms.
        err_sum = (err_dS + sum_k * dS.abs()) @ absK + arithmetic.flush * terms
        bound_dQ = more * err_sum + tiny * (terms > 0).double()
        bounds["dq"] = bound_dQ.transpose(1, 2) + u_result * values["dq"].abs()
        bounds["dk"] = more * (err_dS + sum_q * dS.abs()).mT @ absQ
        weight = (u_operand * P + err_P + (sum_q + eps_drop) * P) * M
        weight = weight + max(1.0, drop_scale) * tiny * visible
        bounds["dv"] = (1 + u_result) * weight.mT @ absdO
        return values, bounds

    size = max(1, max_scores // max(1, batch * heads * seqlen_k))
    parts = [of_queries(slice(i, i + size)) for i in range(0, max(seqlen_q, 1), size)]
    values = _joined([values for values, _ in parts])
    bounds = _joined([bounds for _, bounds in parts])
    # Queries and keys with nothing to add up are exactly 0 as well.
    for name in values.keys() & {"dk", "dv"}:
        values[name] = _sum_group(values[name], group)
        bounds[name] = _sum_group(bounds[name] + tiny * seen, group)
        bounds[name] += u_result * values[name].abs()
    if "max_logit" in values:
        exact = values["max_logit"]
        bound = torch.maximum(bounds.pop("upper") - exact, exact - bounds.pop("lower"))
        bounds["max_logit"] = bound.nan_to_num(nan=0.0) + arithmetic.flush
    elif max_logit:
        values["max_logit"] = torch.full((heads,), -math.inf, dtype=torch.float64, device=q.device)
        bounds["max_logit"] = torch.zeros_like(values["max_logit"])
    pairs = mask.expand(batch, heads, seqlen_q, seqlen_k).sum(dim=(2, 3)).double()
    for name, tensor, terms in (
        ("dslopes", alibi_slopes, pairs),
        ("dsinks", sinks, exists.expand(batch, heads, seqlen_q).sum(2).double()),
    ):
        if tensor is None or name not in values:
            continue
        value, error, magnitude = values[name], bounds[name], bounds.pop(f"|{name}|")
        if tensor.dim() == 1:
            value, error, magnitude, terms = (x.sum(0) for x in (value, error, magnitude, terms))
        error = error + eps * (constants.of_sum(terms) + constants.bias) * magnitude
        result = ARITHMETIC[tensor.dtype]
        u_gradient = constants.result * result.storage
        values[name] = value
        bounds[name] = (1 + u_gradient) * error + u_gradient * value.abs() + result.tiny
    if "dbias" in values:
        values["dbias"], error, magnitude = (
            _sum_to(x, bias_shape)
            for x in (values["dbias"], bounds["dbias"], bounds.pop("|dbias|"))
        )
        terms = _sum_to(mask.expand(bias.shape).double(), bias_shape)
        error = error + eps * constants.of_sum(terms) * magnitude
        result = ARITHMETIC[attn_bias.dtype]
        u_dbias = constants.result * result.storage
        bound = (1 + u_dbias) * error + u_dbias * values["dbias"].abs() + result.tiny * (terms > 0)
        values["dbias"] = values["dbias"].reshape(attn_bias.shape)
        bounds["dbias"] = bound.reshape(attn_bias.shape)
    return Expected(values, bounds)


def expected_of(
    case: Case, inputs: Inputs, *, backward: bool, constants: Constants = CONSTANTS
) -> Expected:
    """`expected_with_bounds` of a case, in the layout of the public function's results."""
    q, k, v, dout, dlse = inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse
    rows_q, rows_k = inputs.packing_q, inputs.packing_k
    if rows_q is not None and rows_k is not None:
        q, dout = (rows_q.unpack(x, case.seqlen_q) for x in (q, dout))
        k, v = (rows_k.unpack(x, case.seqlen_k) for x in (k, v))
        dlse = None if dlse is None else rows_q.unpack(dlse.T, case.seqlen_q).transpose(1, 2)
    expected = expected_with_bounds(
        q,
        k,
        v,
        dout if backward else None,
        dlse,
        attn_bias=inputs.bias,
        softcap=case.softcap,
        **inputs.terms,
        dropout_p=case.dropout,
        kept=kept_of(case),
        max_logit=case.max_logit,
        constants=constants,
        tf32=case.tf32,
        **case.mask_arguments,
        **inputs.visibility,
    )
    if rows_q is None or rows_k is None:
        return expected
    packings = {"out": rows_q, "lse": rows_q, "dq": rows_q, "dk": rows_k, "dv": rows_k}
    for results, of_nothing in ((expected.values, -math.inf), (expected.bounds, 0.0)):
        for name in results.keys() & packings.keys():
            if name == "lse":
                padded = results[name].transpose(1, 2)
                results[name] = packings[name].pack(padded, of_nothing).T
            else:
                results[name] = packings[name].pack(results[name], 0.0)
    return expected


def dropout_generator(case: Case) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(case.seed)


def kept_of(case: Case) -> Tensor | None:
    """What dropout keeps in a call that draws from `dropout_generator`."""
    if case.dropout == 0.0:
        return None
    state = lowlevel.new_rng_state(torch.device(case.device), dropout_generator(case))
    shape = (case.batch, case.heads, case.seqlen_q, case.seqlen_k)
    return lowlevel.dropout_mask(state, case.dropout, *shape)


def error_ratio(actual: Tensor, expected: Tensor, bound: Tensor) -> Tensor:
    """|error| / bound, element by element: inf for a NaN, or where there must be no error; 0 where
    what is within the bound is too large for the dtype of `actual`, and that is infinite."""
    largest = torch.finfo(actual.dtype).max
    actual = actual.detach().double()
    ratio = (actual - expected).abs() / bound
    ratio = ratio.nan_to_num(nan=math.inf, posinf=math.inf)
    overflows = actual.isinf() & (actual.sign() * expected + bound > largest)
    return ratio.masked_fill((actual == expected) | overflows, 0.0)  # infinities too


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
    ratio = error_ratio(actual, expected, bound)
    outside = ratio > 1
    if not outside.any():
        return
    actual = actual.detach().double()
    worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    raise AssertionError(
        f"{name}: {int(outside.sum())} of {outside.numel()} elements are outside the error bound; "
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
    dbias: Tensor | None = None
    dslopes: Tensor | None = None
    dsinks: Tensor | None = None
    max_logit: Tensor | None = None


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Inside, torch allows TF32 or not."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def run(case: Case, inputs: Inputs, *, backward: bool, poisoned: bool = True) -> Results:
    """The package's results, computed in memory that was NaN before if `poisoned`."""
    leaves = [x.detach().requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]
    names = ["dq", "dk", "dv"]
    arguments: dict[str, Any] = {**case.mask_arguments, **inputs.rules}
    function = flash_attn_cuda.flash_attn_varlen_func if case.varlen else flash_attn_func
    if inputs.bias is not None:
        with_gradient = backward and case.bias_grad
        arguments["attn_bias"] = inputs.bias.detach().requires_grad_(with_gradient)
        if with_gradient:
            leaves.append(arguments["attn_bias"])
            names.append("dbias")
    for name, term in inputs.terms.items():
        arguments[name] = term.detach().requires_grad_(backward)
        if backward:
            leaves.append(arguments[name])
            names.append({"alibi_slopes": "dslopes", "sinks": "dsinks"}[name])
    if case.softcap != 0.0:
        arguments["softcap"] = case.softcap
    if case.dropout != 0.0:
        arguments |= {"dropout_p": case.dropout, "generator": dropout_generator(case)}
    with allowing_tf32(case.tf32), poisoned_allocations() if poisoned else nullcontext():
        out, lse, *more = function(
            *leaves[:3],
            deterministic=case.deterministic,
            return_lse=True,
            return_max_logit=case.max_logit,
            **arguments,
        )
        found = {"max_logit": more[0]} if case.max_logit else {}
        if not backward:
            return Results(out, lse, **found)
        results, gradients = [out], [inputs.dout]
        if inputs.dlse is not None:
            results.append(lse)
            gradients.append(inputs.dlse)
        of_leaves = torch.autograd.grad(results, leaves, gradients)
        return Results(out, lse, **found, **dict(zip(names, of_leaves, strict=True)))


def check(case: Case, *, backward: bool) -> Results:
    """Run one case and hold every element of its results against the bound."""
    repeat = f"repeat with: {case.command()}"
    inputs = make_inputs(case)
    results = run(case, inputs, backward=backward)
    try:
        inputs.check_untouched()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{repeat}") from None
    expected = expected_of(case, inputs, backward=backward)
    for name, value in expected.values.items():
        actual = getattr(results, name)
        if actual is None:  # of a bias that needs no gradient
            continue
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
    if name in ("lse", "max_logit"):
        dtype = case.statistics_dtype
    if name in ("dslopes", "dsinks"):
        dtype = case.terms_dtype
    if name == "dbias" and case.bias_dtype is not None:
        dtype = getattr(torch, case.bias_dtype)
    if actual.dtype != dtype:
        raise AssertionError(f"{name} is {actual.dtype}, expected {dtype}\n{repeat}")


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all queries from those of some: one after the other, or their sum."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if len(parts) == 1:
            joined[name] = tensors[0]
        elif name in ("max_logit", "upper", "lower"):
            joined[name] = torch.stack(tensors).amax(dim=0)
        elif name.strip("|") in ("dk", "dv", "dslopes", "dsinks"):  # dbias is summed at the end
            joined[name] = sum(tensors[1:], tensors[0])
        else:
            joined[name] = torch.cat(tensors, dim=1 if name in ("out", "dq") else 2)
    return joined


def _places(
    seqlen_q: int, seqlen_k: int, device: torch.device, visibility: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Which queries exist, (batch or 1, 1, seqlen_q), and how far each is from each key in ALiBi's
    sense, (batch or 1, 1, seqlen_q, seqlen_k)."""
    query, key = (torch.arange(n, device=device) for n in (seqlen_q, seqlen_k))
    lengths = []
    for name, seqlen in (("seqlens_q", seqlen_q), ("seqlens_k", seqlen_k)):
        given = visibility.get(name)
        given = torch.tensor([seqlen], device=device) if given is None else given
        lengths.append(given.long()[:, None, None])
    exists = query < lengths[0]
    offset = (lengths[1] - lengths[0])[..., None]
    return exists, (query[:, None] + offset - key).abs().double()


def _head_sum(x: Tensor) -> Tensor:
    """(batch, heads, ...) -> (batch, heads)."""
    return x.flatten(2).sum(dim=2)


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(dim=-1, keepdim=True)


def _column_sum(x: Tensor) -> Tensor:
    return x.sum(dim=-2, keepdim=True)


def _sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x summed over the dimensions that are 1 in shape."""
    dims = [dim for dim, size in enumerate(shape) if size == 1]
    return x.sum(dims, keepdim=True) if dims else x


def _of_group(x: Tensor, group: int) -> Tensor:
    """(batch, heads, seqlen): the sum over heads of queries that share a head of keys, for each."""
    return x.unflatten(1, (-1, group)).sum(dim=2).repeat_interleave(group, dim=1)


def _sum_group(x: Tensor, group: int) -> Tensor:
    """(batch, heads, seqlen, head_dim) -> (batch, seqlen, heads_kv, head_dim), summed."""
    return x.unflatten(1, (x.shape[1] // group, group)).sum(dim=2).transpose(1, 2)


if __name__ == "__main__":
    repeated = Case.from_json(sys.argv[1])
    check(repeated, backward=True)
    sys.stdout.write(f"within the bound: {repeated}\n")
