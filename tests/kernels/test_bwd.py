# SPDX-License-Identifier: BSD-3-Clause
"""Backward: every element of dq, dk and dv against float64, and what must not change a bit."""

from __future__ import annotations

import pytest
import torch

from flash_attn_cuda import flash_attn_func
from tests.support.cases import Case, Inputs, make_inputs, on_every_device
from tests.support.compare import assert_bitwise_equal, check, run
from tests.support.poison import embed
from tests.support.suite import DTYPES, SUITE

# The CPU's kernels run every head_dim alike. Each CUDA kernel deals with masks and the ends of
# sequences in its own tiles.
ON_HEAD_DIMS = [
    ("cpu", 32),
    *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (32, 96, 128, 192, 256, 512)),
]
on_head_dims = pytest.mark.parametrize(("device", "head_dim"), ON_HEAD_DIMS)


@pytest.mark.parametrize("case", on_every_device(SUITE))
def test_every_element_is_within_the_error_bound(case: Case) -> None:
    check(case, backward=True)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_row_has_no_gradient(device: str, dtype: str, head_dim: int) -> None:
    case = Case(
        seqlen_q=350, seqlen_k=70, head_dim=head_dim, causal=True, dtype=dtype, dlse=True
    ).on(device)
    results = run(case, make_inputs(case), backward=True)
    assert (results.dq[:, : case.seqlen_q - case.seqlen_k] == 0).all()
    for gradient in (results.dq, results.dk, results.dv):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("heads_kv", [1, 16])  # the CPU kernels split the work in two ways
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_that_reaches_the_lse_of_a_masked_row_goes_no_further(
    device: str, dtype: str, head_dim: int, heads_kv: int
) -> None:
    case = Case(
        batch=1,
        seqlen_q=350,
        seqlen_k=70,
        heads=16,
        heads_kv=heads_kv,
        head_dim=head_dim,
        causal=True,
        dtype=dtype,
    ).on(device)
    inputs = make_inputs(case)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    _, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    # As in merging two partial results: a row that saw nothing in either has gradient NaN.
    merged = torch.logaddexp(lse, lse)
    gradients = torch.autograd.grad(merged.sum(), (q, k, v))
    assert (gradients[0][:, : case.seqlen_q - case.seqlen_k] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_is_not_hidden(device: str, dtype: str, head_dim: int) -> None:
    case = Case(seqlen_q=70, seqlen_k=90, head_dim=head_dim, dtype=dtype).on(device)
    inputs = make_inputs(case)
    inputs.q[:, 33] = float("nan")
    results = run(case, inputs, backward=True)
    assert results.dq[:, 33].isnan().all()
    assert results.dk.isnan().all()  # without a mask, every key meets the query
    assert results.dq[:, 34:].isfinite().all()


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_no_query_sees_has_no_gradient(device: str, dtype: str, head_dim: int) -> None:
    case = Case(
        seqlen_q=40, seqlen_k=150, head_dim=head_dim, window=(10, 0), dtype=dtype, dlse=True
    ).on(device)
    results = run(case, make_inputs(case), backward=True)
    unseen = case.seqlen_k - case.seqlen_q - 10
    assert (results.dk[:, :unseen] == 0).all()
    assert (results.dv[:, :unseen] == 0).all()
    assert results.dv[:, unseen:].count_nonzero() > 0


def test_no_keys_at_all(device: str) -> None:
    case = Case(seqlen_k=0, dlse=True).on(device)
    assert (run(case, make_inputs(case), backward=True).dq == 0).all()


@pytest.mark.parametrize("layout", ["bshd", "sliced", "strided_dim"])
def test_no_queries_at_all(device: str, layout: str) -> None:
    case = Case(seqlen_q=0, layout=layout, dlse=True).on(device)
    results = run(case, make_inputs(case), backward=True)
    assert (results.dk == 0).all()
    assert (results.dv == 0).all()


@pytest.mark.parametrize("window", [(-1, 0), (20, 10), (0, 0)])
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_key_changes_no_bit(
    device: str, dtype: str, head_dim: int, window: tuple[int, int]
) -> None:
    case = Case(
        seqlen_q=140,
        seqlen_k=140,
        head_dim=head_dim,
        window=window,
        dtype=dtype,
        deterministic=True,
    ).on(device)
    before = run(case, make_inputs(case), backward=True)
    first_changed = 100
    inputs = make_inputs(case)
    largest = torch.finfo(case.torch_dtype).max
    inputs.k[:, first_changed:] = largest
    inputs.v[:, first_changed:] = -largest
    after = run(case, inputs, backward=True)
    blind = first_changed - window[1]  # queries before it see none of the changed keys
    assert_bitwise_equal("dq", after.dq[:, :blind], before.dq[:, :blind])


@pytest.mark.parametrize("layout", ["sliced", "strided_dim", "packed", "offset"])
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_foreign_bytes_change_no_bit(device: str, dtype: str, head_dim: int, layout: str) -> None:
    case = Case(
        seqlen_q=67,
        seqlen_k=67,
        head_dim=head_dim - 8,  # what follows a row must not fill the columns that it lacks
        layout=layout,
        dtype=dtype,
        causal=True,
    ).on(device)
    among_nan = _gradients(make_inputs(case))
    inputs = make_inputs(case)
    for embedded in inputs.buffers:
        embedded.buffer.nan_to_num_(nan=0.0)
    for name, with_nan, with_zeros in zip(
        ("dq", "dk", "dv"), among_nan, _gradients(inputs), strict=True
    ):
        assert_bitwise_equal(name, with_nan, with_zeros)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_read_in_place_among_nan(device: str, dtype: str, head_dim: int) -> None:
    """NaN before, between and after the rows of q, k, v and dout, where no copy is needed."""
    case = Case(seqlen_q=67, seqlen_k=99, heads=4, head_dim=head_dim, dtype=dtype).on(device)
    inputs = make_inputs(case)
    among_nan = [
        embed(x.cpu(), device, gaps=(24, 16, 8, 0))
        for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    ]
    views = [embedded.view for embedded in among_nan]
    plain = _gradients(inputs)
    for name, with_nan, without in zip(
        ("dq", "dk", "dv"), _gradients(Inputs(*views, None, ())), plain, strict=True
    ):
        assert_bitwise_equal(name, with_nan, without)
    for embedded in among_nan:
        embedded.check_untouched()


@on_head_dims
def test_deterministic_gradients_repeat_bit_for_bit(device: str, head_dim: int) -> None:
    case = Case(
        seqlen_q=257, seqlen_k=300, heads=4, heads_kv=2, head_dim=head_dim, dtype="bfloat16"
    ).on(device)
    inputs = make_inputs(case)
    first = _gradients(inputs)
    for _ in range(10):
        for name, again, once in zip(("dq", "dk", "dv"), _gradients(inputs), first, strict=True):
            assert_bitwise_equal(name, again, once)


@on_head_dims
def test_deterministic_gradients_do_not_depend_on_neighbours(device: str, head_dim: int) -> None:
    case = Case(
        batch=4,
        seqlen_q=97,
        seqlen_k=130,
        heads=4,
        heads_kv=2,
        head_dim=head_dim,
        dtype="bfloat16",
    ).on(device)
    inputs = make_inputs(case)
    together = _gradients(inputs)
    for index in range(case.batch):
        one = slice(index, index + 1)
        alone = _gradients(
            Inputs(inputs.q[one], inputs.k[one], inputs.v[one], inputs.dout[one], None, ())
        )
        for name, separate, joint in zip(("dq", "dk", "dv"), alone, together, strict=True):
            assert_bitwise_equal(name, separate, joint[one])


def _gradients(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = flash_attn_func(q, k, v, causal=True, deterministic=True)
    return torch.autograd.grad(out, (q, k, v), inputs.dout)
