# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of torch's attention share: ours enabled, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flash_attn_cuda import enable_sdpa, lowlevel


@pytest.fixture
def sdpa_enabled() -> Iterator[None]:
    with enable_sdpa():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every pass that our kernels make, in order."""
    made: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(lowlevel, name, counting(name, getattr(lowlevel, name)))
    return made
