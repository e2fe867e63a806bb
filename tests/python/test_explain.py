# SPDX-License-Identifier: BSD-3-Clause
"""explain() names the kernels of a call, and the tensors that it copies first."""

from __future__ import annotations

import pytest
import torch

from flash_attn_cuda import _ops, explain


def test_report_on_the_cpu() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 16).unbind()
    answer = explain(q, k, v)
    assert answer.device == "the CPU"
    assert "flash_fwd_cpu" in str(answer.forward.kernel)
    assert "flash_bwd_cpu" in str(answer.backward.kernel)
    assert answer.copies == {}
    assert "copies" not in str(answer)


def test_copies_on_the_cpu() -> None:
    q, k = torch.randn(2, 2, 5, 4, 16).unbind()
    v = torch.randn(2, 5, 16, 4).transpose(2, 3)
    answer = explain(q, k, v)
    assert answer.copies == {"v": "its head_dim is not contiguous"}
    assert str(answer).endswith("\n  copies v first: its head_dim is not contiguous")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"strides": (0, 0, 0, 1)}, None),
        ({"strides": (7, 1024, 64, 1), "sizes": (1, 128, 16, 64)}, None),  # of a size of 1
        ({"sizes": (2, 128, 16, 60)}, "its head_dim is not a multiple of 8"),
        ({"sizes": (2, 128, 16, 1)}, "its head_dim is not a multiple of 8"),
        ({"sizes": (2, 128, 16, 60), "element_bytes": 4}, None),
        ({"sizes": (2, 128, 16, 62), "element_bytes": 4}, "its head_dim is not a multiple of 4"),
        ({"strides": (131072, 1024, 64, 2)}, "its head_dim is not contiguous"),
        ({"address": 8}, "its address is not a multiple of 16 bytes"),
        ({"strides": (131072, 1028, 64, 1)}, "its strides are not multiples of 16 bytes"),
        ({"strides": (131076, 1024, 64, 1)}, "its strides are not multiples of 16 bytes"),
    ],
)
def test_copies_on_cuda(changes: dict[str, object], reason: str | None) -> None:
    layout = {
        "sizes": (2, 128, 16, 64),
        "strides": (131072, 1024, 64, 1),
        "address": 0,
        "element_bytes": 2,
        "on_cuda": True,
    }
    assert _ops._C.why_copied(**layout | changes) == reason
    if reason is not None and "contiguous" not in reason:
        assert _ops._C.why_copied(**layout | changes | {"on_cuda": False}) is None
