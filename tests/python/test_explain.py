# SPDX-License-Identifier: BSD-3-Clause
"""explain() names the kernels of a call, and the tensors that it copies first."""

from __future__ import annotations

import pytest
import torch

import flash_attn_cuda
from flash_attn_cuda import _ops, explain


def test_report_on_the_cpu() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 16).unbind()
    answer = explain(q, k, v)
    assert answer.device == "the CPU"
    assert "flash_fwd_cpu" in str(answer.forward.kernel)
    assert "flash_bwd_cpu" in str(answer.backward.kernel)
    assert answer.copies == {}
    assert "copies" not in str(answer)


def test_the_terms_of_a_score_are_for_rows_that_have_them() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 16).unbind()
    assert explain(q, k, v, softcap=3.0, dropout_p=0.1, sinks=torch.zeros(4)).forward.kernel
    with pytest.raises(TypeError, match=r"expected rules among .*, got \['softcaps'\]"):
        explain(q, k, v, softcaps=3.0)


@pytest.mark.skipif(
    not flash_attn_cuda.build_info()["architectures"], reason="this build has no CUDA kernels"
)
@pytest.mark.parametrize("pass_name", ["fwd", "bwd"])
def test_rows_without_terms_say_so(pass_name: str) -> None:
    capability = next(
        n for n in (80, 90) if _ops._C.runs_on(flash_attn_cuda.build_info()["architectures"], n)
    )
    answer = _ops._C.explain(
        pass_name=pass_name,
        dtype="bfloat16",
        head_dim=64,
        seqlen_q=9,
        seqlen_k=9,
        window_left=-1,
        window_right=-1,
        general_scores=True,
        softcap=True,
        on_cuda=True,
        compute_capability=capability,
        smem_opt_in=227 * 1024,
    )
    for row in flash_attn_cuda.build_info()["kernels"]:
        if row["pass"] == pass_name and row["family"] == "sm80" and row["head_dim"] == 64:
            reason = answer["reasons"][row["name"]]
            is_refused = row["dtype"] == "bfloat16" and not row["softcap"]
            assert ("softcap" in reason) == is_refused or row["score"] == "plain"


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
