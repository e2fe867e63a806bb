# SPDX-License-Identifier: BSD-3-Clause
"""Forward: every element of out and LSE against float64, and what must not change a bit of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from flash_attn_cuda import flash_attn_func
from tests.support.cases import Case, make_inputs
from tests.support.compare import assert_bitwise_equal, check, run
from tests.support.families import (
    ALL_FAMILIES,
    CUDA_FAMILIES,
    device_of,
    has_forward,
    on_every_family,
    only,
)
from tests.support.suite import DTYPES, SUITE

# The CPU's kernels run every head_dim alike. Each CUDA kernel has its own tiles, and those of sm80
# for more than 128 share scores between warps.
ON_HEAD_DIMS = [
    ("cpu", 32),
    *(
        pytest.param(family, head_dim, marks=pytest.mark.gpu)
        for family in CUDA_FAMILIES
        for head_dim in (32, 96, 128, 192, 256, 512)
        if has_forward(family, head_dim)
    ),
]
on_head_dims = pytest.mark.parametrize(("device", "head_dim"), ON_HEAD_DIMS, indirect=["device"])


@pytest.fixture(params=ALL_FAMILIES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a family, which has no kernels but that family's."""
    name = device_of(request.param)
    with only(request.param):
        yield name


@pytest.mark.parametrize(("device", "case"), on_every_family(SUITE), indirect=["device"], ids=str)
def test_every_element_is_within_the_error_bound(device: str, case: Case) -> None:
    check(case, backward=False)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_row_is_zero_and_minus_infinity(device: str, dtype: str, head_dim: int) -> None:
    case = Case(seqlen_q=350, seqlen_k=70, head_dim=head_dim, causal=True, dtype=dtype).on(device)
    results = run(case, make_inputs(case), backward=False)
    unseeing = case.seqlen_q - case.seqlen_k
    assert (results.out[:, :unseeing] == 0).all()
    assert (results.lse[..., :unseeing] == -math.inf).all()
    assert results.out[:, unseeing:].isfinite().all()
    assert results.lse[..., unseeing:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_keys_at_all(device: str, dtype: str) -> None:
    case = Case(seqlen_k=0, dtype=dtype).on(device)
    results = run(case, make_inputs(case), backward=False)
    assert (results.out == 0).all()
    assert (results.lse == -math.inf).all()


@pytest.mark.parametrize("window", [(-1, 0), (20, 10), (0, 0)])
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_key_changes_no_bit(
    device: str, dtype: str, head_dim: int, window: tuple[int, int]
) -> None:
    case = Case(seqlen_q=140, seqlen_k=140, head_dim=head_dim, window=window, dtype=dtype).on(
        device
    )
    before = run(case, make_inputs(case), backward=False)
    first_changed = 100
    inputs = make_inputs(case)
    largest = torch.finfo(case.torch_dtype).max
    inputs.k[:, first_changed:] = largest
    inputs.v[:, first_changed:] = -largest
    after = run(case, inputs, backward=False)
    blind = first_changed - window[1]  # queries before it see none of the changed keys
    assert_bitwise_equal("out", after.out[:, :blind], before.out[:, :blind])
    assert_bitwise_equal("lse", after.lse[..., :blind], before.lse[..., :blind])
    assert not torch.equal(after.lse[..., blind:], before.lse[..., blind:])


@pytest.mark.parametrize("layout", ["sliced", "strided_dim", "packed", "offset"])
@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_foreign_bytes_change_no_bit(device: str, dtype: str, head_dim: int, layout: str) -> None:
    case = Case(
        seqlen_q=67,
        seqlen_k=67,
        heads=4,
        head_dim=head_dim - 8,  # what follows a row must not fill the columns that it lacks
        layout=layout,
        dtype=dtype,
        causal=True,
    ).on(device)
    among_nan = run(case, make_inputs(case), backward=False)
    inputs = make_inputs(case)
    for embedded in inputs.buffers:
        embedded.buffer.nan_to_num_(nan=0.0)
    among_zeros = run(case, inputs, backward=False)
    assert_bitwise_equal("out", among_nan.out, among_zeros.out)
    assert_bitwise_equal("lse", among_nan.lse, among_zeros.lse)


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_stays_in_its_row(device: str, dtype: str, head_dim: int) -> None:
    case = Case(seqlen_q=70, seqlen_k=90, head_dim=head_dim, dtype=dtype).on(device)
    before = run(case, make_inputs(case), backward=False)
    inputs = make_inputs(case)
    inputs.q[:, 33] = float("nan")
    after = run(case, inputs, backward=False)
    assert after.out[:, 33].isnan().all()
    assert after.lse[..., 33].isnan().all()
    others = [row for row in range(case.seqlen_q) if row != 33]
    assert_bitwise_equal("out", after.out[:, others], before.out[:, others])
    assert_bitwise_equal("lse", after.lse[..., others], before.lse[..., others])


@on_head_dims
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_element_does_not_depend_on_its_neighbours(
    device: str, dtype: str, head_dim: int
) -> None:
    case = Case(
        batch=5, seqlen_q=97, seqlen_k=130, heads=4, head_dim=head_dim, causal=True, dtype=dtype
    ).on(device)
    inputs = make_inputs(case)
    together = run(case, inputs, backward=False)
    for index in range(case.batch):
        alone = slice(index, index + 1)
        out, lse = flash_attn_func(
            inputs.q[alone],
            inputs.k[alone],
            inputs.v[alone],
            return_lse=True,
            **case.mask_arguments,
        )
        assert_bitwise_equal("out", out, together.out[alone])
        assert_bitwise_equal("lse", lse, together.lse[alone])


@on_head_dims
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_forward_repeats_itself_bit_for_bit(
    device: str, head_dim: int, deterministic: bool
) -> None:
    case = Case(
        seqlen_q=257, seqlen_k=300, heads=4, head_dim=head_dim, dtype="bfloat16", causal=True
    ).on(device)
    inputs = make_inputs(case)
    first = flash_attn_func(
        inputs.q, inputs.k, inputs.v, causal=True, deterministic=deterministic, return_lse=True
    )
    for _ in range(10):
        again = flash_attn_func(
            inputs.q, inputs.k, inputs.v, causal=True, deterministic=deterministic, return_lse=True
        )
        assert_bitwise_equal("out", again[0], first[0])
        assert_bitwise_equal("lse", again[1], first[1])
