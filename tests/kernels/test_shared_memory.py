# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of GPUs with less shared memory than the one at hand, run on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flash_attn_cuda import _C
from tests.support.cases import Case
from tests.support.compare import check
from tests.support.families import only

pytestmark = pytest.mark.gpu

CASES = [
    Case(
        seqlen_q=130,
        seqlen_k=200,
        heads=4,
        heads_kv=2,
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        dlse=True,
        deterministic=causal,
        device="cuda",
    )
    for head_dim in (40, 64, 96, 128, 192, 256, 512)
    for dtype, causal in (("bfloat16", True), ("float16", False))
]


# Compute capability 8.6, 8.9 and 12.0; 8.0 and 8.7.
@pytest.fixture(params=[99 * 1024, 163 * 1024], ids=["99KiB", "163KiB"])
def limit(request: pytest.FixtureRequest) -> Iterator[int]:
    _C.limit_shared_memory(request.param)
    with only("sm80"):  # for GPUs before Hopper
        yield request.param
    _C.limit_shared_memory(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_within_the_error_bound(limit: int, case: Case) -> None:
    check(case, backward=True)


def test_selection_knows_of_the_limit(limit: int) -> None:
    own = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    assert _C.query_cuda_device(0)[1] == min(limit, own)
