# SPDX-License-Identifier: BSD-3-Clause
"""Which transformers there is, and whether it has what registering an attention takes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST = (4, 53)


def _installed() -> tuple[int, ...]:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(
            "flash_attn_cuda.hf needs transformers 4.53 or newer, and there is none: pip install "
            "transformers"
        ) from None
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST:
        raise ImportError(
            "flash_attn_cuda.hf needs transformers 4.53 or newer, and there is "
            f"{found}, in which an attention implementation cannot register the mask that it "
            "takes: pip install --upgrade transformers"
        )
    return numbers


BEFORE_5 = _installed() < (5,)
