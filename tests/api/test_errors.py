# SPDX-License-Identifier: BSD-3-Clause
"""Every refusal: the right exception, before anything runs, naming the argument and what came."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    lowlevel,
)
from tests.support.arguments import LATER


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q = (2, 8, 4, 16)
KV = (2, 8, 2, 16)

# name, (shapes of q, k, v), exception, a part of the message
BAD_SHAPES = [
    ("q of rank 3", ((8, 4, 16), KV, KV), ValueError, r"q: expected 4 dimensions.*\(8, 4, 16\)"),
    ("k of rank 3", (Q, (8, 2, 16), KV), ValueError, r"k: expected 4 dimensions.*\(8, 2, 16\)"),
    ("v of rank 5", (Q, KV, (1, *KV)), ValueError, r"v: expected 4 dimensions.*\(1, 2, 8, 2, 16\)"),
    ("q of rank 0", ((), KV, KV), ValueError, r"q: expected 4 dimensions.*\(\)"),
    ("batch of k", (Q, (3, 8, 2, 16), (3, 8, 2, 16)), ValueError, r"k: expected batch 2, got 3"),
    ("batch of v", (Q, KV, (3, 8, 2, 16)), ValueError, r"v: expected batch 2, got 3"),
    ("seqlen of v", (Q, KV, (2, 9, 2, 16)), ValueError, r"v: expected seqlen\w* 8, got 9"),
    ("heads of v", (Q, KV, (2, 8, 4, 16)), ValueError, r"v: expected heads\w* 2, got 4"),
    ("head_dim of k", (Q, (2, 8, 2, 8), KV), ValueError, r"k: expected head_dim 16, got 8"),
    ("head_dim 0 of v", (Q, KV, (2, 8, 2, 0)), ValueError, r"v: expected head_dim of at least 1"),
    ("3 heads for 4", (Q, (2, 8, 3, 16), (2, 8, 3, 16)), ValueError, r"heads.* 4 .*got 3"),
    ("8 heads for 4", (Q, (2, 8, 8, 16), (2, 8, 8, 16)), ValueError, r"heads.* 4 .*got 8"),
    ("0 heads for 4", (Q, (2, 8, 0, 16), (2, 8, 0, 16)), ValueError, r"heads.* 4 .*got 0"),
    ("head_dim 0", ((2, 8, 4, 0), (2, 8, 2, 0), (2, 8, 2, 0)), ValueError, r"q.*head_dim.*0"),
]


@pytest.mark.parametrize(
    ("shapes", "exception", "message"),
    [pytest.param(*rest, id=name) for name, *rest in BAD_SHAPES],
)
def test_shapes(
    device: str, shapes: tuple[tuple[int, ...], ...], exception: type[Exception], message: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with pytest.raises(exception, match=message):
        flash_attn_func(*(_tensor(*shape, dtype=dtype, device=device) for shape in shapes))


def test_head_dim_over_the_limit(device: str) -> None:
    x = _tensor(1, 8, 1, 513, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"head_dim .* at most 512 .*, got 513"):
        flash_attn_func(x, x, x)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtype(device: str, dtype: torch.dtype) -> None:
    x = torch.zeros(Q, device=device).to(dtype)
    with pytest.raises(TypeError, match=r"q: expected bfloat16, float16, float32 or float64, got"):
        flash_attn_func(x, x, x)


@pytest.mark.parametrize("odd", [1, 2])
def test_mixed_dtypes(device: str, odd: int) -> None:
    qkv = [_tensor(*Q, dtype=torch.bfloat16, device=device) for _ in range(3)]
    qkv[odd] = qkv[odd].half()
    with pytest.raises(
        TypeError, match=rf"{'qkv'[odd]}: expected .*bfloat16 like q, got .*float16"
    ):
        flash_attn_func(*qkv)


@pytest.mark.gpu
def test_float64_on_cuda_names_the_dtypes_that_work() -> None:
    x = _tensor(*Q, dtype=torch.float64, device="cuda")
    with pytest.raises(
        TypeError, match=r"expected bfloat16, float16 or float32 on CUDA, got float64; .*autocast"
    ):
        flash_attn_func(x, x, x)


@pytest.mark.gpu
def test_float32_on_cuda_has_a_limit_of_its_own() -> None:
    x = _tensor(1, 8, 1, 257, device="cuda")
    with pytest.raises(ValueError, match=r"head_dim .* at most 256 in float32 on CUDA, got 257"):
        flash_attn_func(x, x, x)


@pytest.mark.gpu
def test_autocast_on_cuda_casts_float32() -> None:
    x = _tensor(*Q, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert flash_attn_func(x, x, x).dtype == torch.bfloat16


def test_autocast_on_the_cpu_casts() -> None:
    x = torch.randn(Q)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_func(x, x, x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flash_attn_func(*[x.bfloat16()] * 3))


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.gpu
def test_mixed_devices(odd: int) -> None:
    qkv = [_tensor(*Q, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    qkv[odd] = qkv[odd].cpu()
    with pytest.raises(ValueError, match=r"[kv]: expected device"):
        flash_attn_func(*qkv)


@pytest.mark.parametrize("odd", [1, 2])
def test_mixed_devices_while_tracing(odd: int) -> None:
    with torch._subclasses.FakeTensorMode():
        qkv = [torch.empty(Q, dtype=torch.bfloat16, device="cpu") for _ in range(3)]
        qkv[odd] = torch.empty(Q, dtype=torch.bfloat16, device="cuda")
        with pytest.raises((ValueError, RuntimeError), match=r"device"):
            flash_attn_func(*qkv)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (-1, -7)], ids=str)
def test_window_below_minus_one(device: str, window: tuple[int, int]) -> None:
    x = _tensor(*Q, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"window_size.*-1.*got \(-?\d+, -?\d+\)"):
        flash_attn_func(x, x, x, window_size=window)


@pytest.mark.parametrize("window", [(1,), (1, 2, 3), ()], ids=str)
def test_window_of_wrong_length(window: tuple[int, ...]) -> None:
    x = _tensor(*Q)
    with pytest.raises(ValueError, match=r"window_size: expected \(left, right\)"):
        flash_attn_func(x, x, x, window_size=window)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_softmax_scale_must_be_finite(device: str, scale: float) -> None:
    x = _tensor(*Q, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"softmax_scale: expected a finite number"):
        flash_attn_func(x, x, x, softmax_scale=scale)


CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize(
    ("attention", "shapes", "sequences"),
    [
        (flash_attn_func, (Q, Q, Q), 0),
        (flash_attn_qkvpacked_func, ((2, 8, 3, 4, 16),), 0),
        (flash_attn_kvpacked_func, (Q, (2, 8, 2, 4, 16)), 0),
        (flash_attn_varlen_func, ((8, 4, 16),) * 3, 2),
        (flash_attn_varlen_qkvpacked_func, ((8, 3, 4, 16),), 1),
        (flash_attn_varlen_kvpacked_func, ((8, 4, 16), (8, 2, 4, 16)), 2),
    ],
    ids=["plain", "qkvpacked", "kvpacked", "varlen", "varlen_qkvpacked", "varlen_kvpacked"],
)
def test_an_argument_for_later_is_never_ignored(
    attention: Callable[..., Tensor],
    shapes: tuple[tuple[int, ...], ...],
    sequences: int,
    name: str,
) -> None:
    if name not in inspect.signature(attention).parameters:
        assert name == "block_table"
        return
    tensors = [_tensor(*shape) for shape in shapes]
    with pytest.raises(NotImplementedError, match=name):
        attention(*tensors, *sequences * [CU_SEQLENS], **{name: LATER[name]})


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_TERMS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"softcap": -1.0}, ValueError, r"expected 0 \(none\) or a positive number .*, got -1"),
    ({"softcap": float("nan")}, ValueError, r"0 \(none\) or a positive number .* float32, got nan"),
    ({"softcap": 1e39}, ValueError, r"positive number within float32, got 1e\+39"),
    ({"softcap": 1e-40}, ValueError, r"positive number within float32, got 1e-40"),
    ({"softcap": "a"}, TypeError, r"expected a number, got str"),
    ({"dropout_p": -0.1}, ValueError, r"expected a probability from 0 to 1, got -0.1"),
    ({"dropout_p": 1.1}, ValueError, r"expected a probability from 0 to 1, got 1.1"),
    ({"dropout_p": float("nan")}, ValueError, r"expected a probability from 0 to 1, got nan"),
    ({"dropout_p": torch.tensor(0.1)}, TypeError, r"expected a number, got Tensor"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"shape \(4,\) or \(2, 4\), got \(3,\)"),
    ({"alibi_slopes": torch.ones(3, 4)}, ValueError, r"\(4,\) or \(2, 4\), got \(3, 4\)"),
    ({"alibi_slopes": torch.ones(1, 2, 4)}, ValueError, r"\(2, 4\), got \(1, 2, 4\)"),
    ({"alibi_slopes": torch.ones(())}, ValueError, r"\(4,\) or \(2, 4\), got \(\)"),
    ({"alibi_slopes": torch.ones(4).double()}, TypeError, r"float32 for q of .*, got float64"),
    ({"alibi_slopes": torch.ones(4).int()}, TypeError, r"expected bfloat16, .*, got Int"),
    ({"alibi_slopes": [1.0] * 4}, TypeError, r"expected a torch.Tensor or None, got list"),
    ({"sinks": torch.ones(2, 4)}, ValueError, r"expected shape \(4,\), got \(2, 4\)"),
    ({"sinks": torch.ones(4).double()}, TypeError, r"float32 for q of .*, got float64"),
    ({"sinks": 1.0}, TypeError, r"expected a torch.Tensor or None, got float"),
    ({"generator": 3, "dropout_p": 0.1}, TypeError, r"torch.Generator or None, got int"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("arguments", "exception", "message"), BAD_TERMS)
def test_terms(
    arguments: dict[str, object], exception: type[Exception], message: str, packed: bool
) -> None:
    x = _tensor(8, 4, 16) if packed else _tensor(*Q)
    sequences = 2 * [CU_SEQLENS] if packed else []
    attention = flash_attn_varlen_func if packed else flash_attn_func
    state = torch.get_rng_state()
    with pytest.raises(exception, match=rf"^{next(iter(arguments))}: .*{message}"):
        attention(x, x, x, *sequences, **arguments)
    assert torch.equal(torch.get_rng_state(), state)


BAD_STATES: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(2), TypeError, r"expected int64, got Float"),
    (torch.zeros(3).long(), ValueError, r"expected shape \(2,\), got \(3,\)"),
    ((1, 2), TypeError, r"expected a torch.Tensor or None, got tuple"),
]


@pytest.mark.parametrize(("state", "exception", "message"), BAD_STATES)
def test_states_of_dropout(state: Any, exception: type[Exception], message: str) -> None:
    x = _tensor(*Q)
    with pytest.raises(exception, match=rf"^rng_state: {message}"):
        lowlevel.forward(x, x, x, dropout_p=0.1, rng_state=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout_p": 2.0}, r"^dropout_p: expected a probability"),
        ({"batch": -1}, r"^batch: expected 0 to 2147483647, got -1"),
        ({"seqlen_k": 2**30}, r"^seqlen_k: expected 0 to 536870912, got 1073741824"),
    ],
)
def test_dropout_mask(changes: dict[str, Any], message: str) -> None:
    good = {"dropout_p": 0.1, "batch": 1, "heads": 1, "seqlen_q": 2, "seqlen_k": 2}
    with pytest.raises(ValueError, match=message):
        lowlevel.dropout_mask(torch.zeros(2, dtype=torch.int64), **(good | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "rng_state", "generator"])
def test_terms_on_another_device(name: str) -> None:
    x = _tensor(*Q, dtype=torch.bfloat16, device="cuda")
    value: Any = torch.ones(4)
    if name == "rng_state":
        value = torch.zeros(2, dtype=torch.int64)
    if name == "generator":
        value = torch.Generator()
    attention: Any = lowlevel.forward if name == "rng_state" else flash_attn_func
    with pytest.raises(ValueError, match=rf"^{name}: expected (device|one of) cuda"):
        attention(x, x, x, dropout_p=0.1, **{name: value})


BAD_RULES: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("attn_bias", {"attn_bias": torch.zeros(3, 8)}, ValueError, r"broadcasts to \(2, 4, 8, 8\)"),
    ("attn_bias of rank 5", {"attn_bias": torch.zeros(1, 1, 1, 8, 8)}, ValueError, r"broadcasts"),
    ("attn_bias of int", {"attn_bias": torch.zeros(8, 8).int()}, TypeError, r"got Int"),
    ("attn_bias of double", {"attn_bias": torch.zeros(8, 8).double()}, TypeError, r"got float64"),
    ("attn_bias no tensor", {"attn_bias": 1.0}, TypeError, r"torch.Tensor or None, got float"),
    ("attn_mask of float", {"attn_mask": torch.zeros(8, 8)}, TypeError, r"bool, True .* got Float"),
    ("attn_mask", {"attn_mask": torch.ones(8, 7).bool()}, ValueError, r"broadcasts .* \(8, 7\)"),
    (
        "key_padding_mask",
        {"key_padding_mask": torch.ones(8, 2).bool()},
        ValueError,
        r"expected shape \(2, 8\), got \(8, 2\)",
    ),
    (
        "block_mask",
        {"block_mask": torch.ones(2, 2).bool()},
        ValueError,
        r"broadcasts to \(2, 4, 1, 1\), got \(2, 2\)",
    ),
    ("seqlens_q", {"seqlens_q": _int32(8, 9)}, ValueError, r"0 to the 8 rows of sequence 1, got 9"),
    ("seqlens_k", {"seqlens_k": _int32(-1, 8)}, ValueError, r"rows of sequence 0, got -1"),
    ("seqlens_k of long", {"seqlens_k": _int32(8, 8).long()}, TypeError, r"int32, got Long"),
    ("seqlens_q shape", {"seqlens_q": _int32(8)}, ValueError, r"shape \(2,\), got \(1,\)"),
    (
        "prefix_lens",
        {"prefix_lens": _int32(3, -3)},
        ValueError,
        r"0 or more keys, got -3 at index 1",
    ),
    (
        "document_ids",
        {"document_ids": torch.zeros(2, 7, dtype=torch.int32)},
        ValueError,
        r"expected shape \(2, 8\), got \(2, 7\)",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [pytest.param(*rest, id=name) for name, *rest in BAD_RULES],
)
def test_rules(arguments: dict[str, object], exception: type[Exception], message: str) -> None:
    x = _tensor(*Q)
    with pytest.raises(exception, match=rf"^{next(iter(arguments))}: .*{message}"):
        flash_attn_func(x, x, x, **arguments)


def test_documents_want_as_many_queries_as_keys() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^document_ids: expected as many .* got 8 and 9"):
        flash_attn_func(_tensor(*Q), *2 * [_tensor(2, 9, 4, 16)], document_ids=ids)


BAD_SEQUENCES: list[tuple[str, dict[str, object], type[Exception], str]] = [
    (
        "falling",
        {"cu_seqlens_q": _int32(0, 5, 3)},
        ValueError,
        r"never decrease.* 3 after 5 at .* 2",
    ),
    ("past the end", {"cu_seqlens_k": _int32(0, 5, 9)}, ValueError, r"the 8 rows of k, got 9"),
    ("negative", {"cu_seqlens_q": _int32(-1, 5, 8)}, ValueError, r"from 0 or more .* got -1"),
    ("of long", {"cu_seqlens_q": _int32(0, 3, 8).long()}, TypeError, r"expected int32, got Long"),
    ("empty", {"cu_seqlens_q": _int32()}, ValueError, r"shape \(batch \+ 1,\), got \(0,\)"),
    ("other batch", {"cu_seqlens_k": _int32(0, 8)}, ValueError, r"shape \(3,\), got \(2,\)"),
    ("none", {"cu_seqlens_q": None}, TypeError, r"torch.Tensor, got NoneType"),
    ("used", {"seqused_q": _int32(3, 6)}, ValueError, r"0 to the 5 rows of sequence 1, got 6"),
    ("length", {"max_seqlen_q": 5.5}, TypeError, r"int, a Tensor or None, got 5.5"),
]


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [pytest.param(*rest, id=name) for name, *rest in BAD_SEQUENCES],
)
def test_sequences(arguments: dict[str, object], exception: type[Exception], message: str) -> None:
    x = _tensor(8, 4, 16)
    sequences = {"cu_seqlens_q": CU_SEQLENS, "cu_seqlens_k": CU_SEQLENS}
    with pytest.raises(exception, match=rf"^{next(iter(arguments))}: .*{message}"):
        flash_attn_varlen_func(x, x, x, **(sequences | arguments))


def test_a_bias_must_have_room_for_the_longest_sequence() -> None:
    x = _tensor(8, 4, 16)
    with pytest.raises(ValueError, match=r"^attn_bias, .*: expected room for the 5 rows of .* 1"):
        flash_attn_varlen_func(x, x, x, CU_SEQLENS, CU_SEQLENS, attn_bias=torch.zeros(4, 5))


def test_packed_tensors_have_three_dimensions() -> None:
    with pytest.raises(ValueError, match=r"^q: expected 3 dimensions .* \(2, 8, 4, 16\)"):
        flash_attn_varlen_func(*3 * [_tensor(*Q)], CU_SEQLENS, CU_SEQLENS)


@pytest.mark.gpu
def test_validation_looks_at_what_cuda_tensors_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tensor(8, 4, 16, dtype=torch.bfloat16, device="cuda")
    bad = _int32(0, 5, 3).cuda()
    flash_attn_varlen_func(x, x, x, bad, bad)  # no error, and no harm
    monkeypatch.setenv("FLASH_ATTN_CUDA_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: .* never decrease"):
        flash_attn_varlen_func(x, x, x, bad, bad)


@pytest.mark.parametrize("shape", [(2, 8, 4, 16), (2, 8, 2, 4, 16)], ids=str)
def test_packed_qkv_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^qkv: expected shape \(batch, seqlen, 3, "):
        flash_attn_qkvpacked_func(_tensor(*shape))


@pytest.mark.parametrize("shape", [(2, 8, 4, 16), (2, 8, 3, 4, 16)], ids=str)
def test_packed_kv_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^kv: expected shape \(batch, seqlen, 2, "):
        flash_attn_kvpacked_func(_tensor(*Q), _tensor(*shape))


def test_running_out_of_memory_is_torchs_own_error() -> None:
    q = _tensor(1, 1, 1, 8).expand(1, 2**28, 4096, 8)  # nothing yet; its output is 32 TiB
    with pytest.raises(torch.OutOfMemoryError, match=r"CPU out of memory\. .* on cpu") as caught:
        flash_attn_func(q, *2 * (_tensor(1, 1, 4096, 8),))
    assert ".h" not in str(caught.value)


@pytest.mark.parametrize(
    "window_size", [None, (None, None), (1.5, 0), (1, 2, 3), (-2, 0), (3, -5)], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_window_size(window_size: Any, causal: bool) -> None:
    x = _tensor(*Q)
    with pytest.raises(ValueError, match=r"^window_size: expected \(left, right\), .*, got "):
        flash_attn_func(x, x, x, causal=causal, window_size=window_size)


def test_huge_windows_are_unbounded() -> None:
    x = _tensor(*Q)
    everything = flash_attn_func(x, x, x)
    assert torch.equal(flash_attn_func(x, x, x, window_size=(2**63, 2**80)), everything)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_not_a_tensor(position: int) -> None:
    arguments: list[Any] = [_tensor(*Q)] * 3
    arguments[position] = None
    with pytest.raises(TypeError, match=rf"^{'qkv'[position]}: expected a torch.Tensor, got None"):
        flash_attn_func(*arguments)


@pytest.mark.parametrize(
    ("scale", "error"), [("a", TypeError), (float("nan"), ValueError), (1e39, ValueError)]
)
def test_softmax_scale(scale: Any, error: type[Exception]) -> None:
    x = _tensor(*Q)
    with pytest.raises(error, match=r"^softmax_scale: expected a "):
        flash_attn_func(x, x, x, softmax_scale=scale)


def test_meta_tensors_have_shapes() -> None:
    x = _tensor(*Q, device="meta")
    out, lse = flash_attn_func(x, x, x, return_lse=True)
    assert out.shape == x.shape
    assert lse.shape == (Q[0], Q[2], Q[1])


def test_messages_carry_no_source_path() -> None:
    with pytest.raises(ValueError, match=r"q: ") as caught:
        flash_attn_func(_tensor(8, 4, 16), _tensor(*KV), _tensor(*KV))
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


# The backward operator is also called directly, by code that splits a sequence over devices.
BWD_ARGUMENTS = ("dout", "dlse", "q", "k", "v", "out", "softmax_lse")


@pytest.mark.parametrize("name", BWD_ARGUMENTS)
@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_bwd_checks_each_tensor(name: str, fault: str) -> None:
    q, kv, lse = _tensor(*Q), _tensor(*KV), _tensor(2, 4, 8)
    arguments = dict(zip(BWD_ARGUMENTS, (q, lse, q, kv, kv, q, lse), strict=True))
    good = arguments[name]
    arguments[name] = good[..., :-1] if fault == "shape" else good.to(torch.float16)
    # A wrong q or v is told by what no longer fits it.
    blamed = {"q": r"(q|k|dout|out|softmax_lse)", "v": r"(v|dout)"}.get(name, name)
    with pytest.raises(RuntimeError, match=rf"^(ValueError|TypeError): {blamed}: expected"):
        torch.ops.flash_attn_cuda.bwd(*arguments.values(), 0.25, -1, -1, False, False)
