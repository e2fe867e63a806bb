# SPDX-License-Identifier: BSD-3-Clause
"""A share of what `python -m tests.fuzz` runs; see there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from tests.fuzz import cases
from tests.support.cases import Case
from tests.support.compare import check

CASES = {"cpu": 500, "cuda": 1500}
PARTS = 10


@cache
def _cases(device: str) -> list[Case]:
    return list(itertools.islice(cases(device, seed=0), CASES[device]))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Problems are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_problems_are_within_the_error_bound(device: str, part: int) -> None:
    for case in _cases(device)[part::PARTS]:
        check(case, backward=True)
