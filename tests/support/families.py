# SPDX-License-Identifier: BSD-3-Clause
"""The kernel families, and how to run one where selection prefers another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from flash_attn_cuda import _C
from tests.support.cases import Case

CUDA_FAMILIES = ("sm80", "sm90")
ALL_FAMILIES = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in CUDA_FAMILIES)]


@contextmanager
def only(family: str) -> Iterator[None]:
    """No kernels of other families run on CUDA inside this context."""
    _C.limit_family(family)
    try:
        yield
    finally:
        _C.limit_family("")


def device_of(family: str) -> str:
    """A device that runs the family; skips the test where there is none."""
    if family == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return "cpu" if family == "cpu" else "cuda"


def has_forward(family: str, head_dim: int) -> bool:
    return any(
        row["family"] == family and row["pass"] == "fwd" and row["head_dim"] >= head_dim
        for row in _C.kernel_table()
    )


def on_every_family(cases: Iterable[Case]) -> list[object]:
    """pytest parameters (family, case): each case with each family that has a forward for it."""
    cpu = list(cases)
    # Cases that differ in dtype alone may be the same on CUDA.
    cuda = dict.fromkeys(case.on("cuda") for case in cpu)
    return [
        *(("cpu", case) for case in cpu),
        *(
            pytest.param(family, case, marks=pytest.mark.gpu)
            for family in CUDA_FAMILIES
            for case in cuda
            if has_forward(family, case.head_dim)
        ),
    ]
