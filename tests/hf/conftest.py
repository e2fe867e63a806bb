# SPDX-License-Identifier: BSD-3-Clause
"""Models this small run no faster on many threads, which spend their time waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
