# SPDX-License-Identifier: BSD-3-Clause
"""Selection is a pure function of the problem, so every device is tested here, without any."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import flash_attn_cuda
from flash_attn_cuda import _C
from tests.support.families import only

# The most shared memory of a block: RTX 30, A100, H100.
SHARED_MEMORY = (99 * 1024, 163 * 1024, 227 * 1024)
ARCHITECTURES = flash_attn_cuda.build_info()["architectures"]
HOPPER = 90
LARGEST_HEAD_DIM = {"bfloat16": 512, "float16": 512, "float32": 256, "tf32": 256}  # on CUDA
# Devices that the build has code for: it may be for one kind of GPU alone.
CAPABILITIES = [n for n in (80, 86, 89, HOPPER, 100, 120) if _C.runs_on(ARCHITECTURES, n)]
needs_cuda_build = pytest.mark.skipif(not ARCHITECTURES, reason="this build has no CUDA kernels")
needs_hopper_build = pytest.mark.skipif(
    "sm_90a" not in ARCHITECTURES, reason="this build has no kernels of sm90"
)


def decide(**changes: Any) -> dict[str, Any]:
    problem: dict[str, Any] = {
        "pass_name": "fwd",
        "dtype": "bfloat16",
        "head_dim": 128,
        "seqlen_q": 1000,
        "seqlen_k": 1000,
        "window_left": -1,
        "window_right": -1,
        "general_scores": False,
        "softcap": False,
        "on_cuda": True,
        "compute_capability": CAPABILITIES[0] if CAPABILITIES else 0,
        "smem_opt_in": 227 * 1024,
    }
    return _C.explain(**(problem | changes))


@needs_cuda_build
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "flash_fwd_sm80_bfloat16_d128"),
        ({"window_right": 0}, "flash_fwd_sm80_bfloat16_d128"),
        ({"window_left": 256, "window_right": 256}, "flash_fwd_sm80_bfloat16_d128"),
        ({"head_dim": 8}, "flash_fwd_sm80_bfloat16_d64"),
        ({"head_dim": 64}, "flash_fwd_sm80_bfloat16_d64"),
        ({"head_dim": 65}, "flash_fwd_sm80_bfloat16_d96"),
        ({"head_dim": 160}, "flash_fwd_sm80_bfloat16_d192"),
        ({"head_dim": 256}, "flash_fwd_sm80_bfloat16_d256"),
        ({"head_dim": 257}, "flash_fwd_sm80_bfloat16_d512"),
        ({"dtype": "float16"}, "flash_fwd_sm80_float16_d128"),
        ({"dtype": "float32"}, "flash_fwd_sm80_float32_d128"),
        ({"dtype": "tf32", "head_dim": 129}, "flash_fwd_sm80_tf32_d256"),
        ({"dtype": "float32", "pass_name": "bwd"}, "flash_bwd_sm80_float32_d128"),
        ({"pass_name": "bwd"}, "flash_bwd_sm80_bfloat16_d128"),
        ({"pass_name": "bwd", "window_right": 0}, "flash_bwd_sm80_bfloat16_d128"),
        ({"on_cuda": False}, "flash_fwd_cpu_bfloat16_d512"),
        ({"on_cuda": False, "dtype": "float64"}, "flash_fwd_cpu_float64_d512"),
        ({"on_cuda": False, "head_dim": 512}, "flash_fwd_cpu_bfloat16_d512"),
    ],
)
def test_documented_choices(changes: dict[str, Any], kernel: str) -> None:
    with only("sm80"):  # a build may be for Hopper alone
        assert decide(**changes)["kernel"].startswith(f"{kernel}_")


@needs_hopper_build
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "flash_fwd_sm90_bfloat16_d128"),
        ({"window_right": 0}, "flash_fwd_sm90_bfloat16_d128"),
        ({"dtype": "float16", "head_dim": 1}, "flash_fwd_sm90_float16_d64"),
        ({"head_dim": 256}, "flash_fwd_sm90_bfloat16_d256"),
        ({"head_dim": 257}, "flash_fwd_sm80_bfloat16_d512"),
        ({"pass_name": "bwd"}, "flash_bwd_sm90_bfloat16_d128"),
        ({"pass_name": "bwd", "head_dim": 129}, "flash_bwd_sm90_bfloat16_d192"),
        ({"pass_name": "bwd", "head_dim": 256}, "flash_bwd_sm90_bfloat16_d256"),
        ({"pass_name": "bwd", "head_dim": 257}, "flash_bwd_sm80_bfloat16_d512"),
        ({"smem_opt_in": 99 * 1024}, "flash_fwd_sm80_bfloat16_d128"),
        ({"dtype": "float32"}, "flash_fwd_sm80_float32_d128"),
    ],
)
def test_hopper_prefers_its_own_kernels(changes: dict[str, Any], kernel: str) -> None:
    assert decide(compute_capability=HOPPER, **changes)["kernel"].startswith(f"{kernel}_")


@needs_cuda_build
def test_no_other_gpu_runs_hoppers_kernels() -> None:
    for capability in CAPABILITIES:
        reasons = decide(compute_capability=capability)["reasons"]
        of_sm90 = {reason for name, reason in reasons.items() if "_sm90_" in name}
        only_hopper = {"for GPUs of compute capability 9.0"}
        assert (of_sm90 == only_hopper) == (capability != HOPPER)


@needs_cuda_build
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_a_test_can_leave_out_the_other_families(family: str) -> None:
    def built() -> set[str]:
        return {row["family"] for row in _C.kernel_table() if row["built"]}

    before = built()
    with only(family):
        assert built() == before & {family, "cpu"}
    assert built() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"on_cuda": False, "head_dim": 513},
            "ValueError: head_dim of q, k, v: expected at most 512 in bfloat16 on the CPU, got 513",
        ),
        pytest.param(
            {"compute_capability": 75},
            "NotImplementedError: no kernel for sm_75; compiled: ",
            marks=needs_cuda_build,
        ),
        pytest.param(
            {"dtype": "float64"},
            "TypeError: q, k, v: expected bfloat16, float16 or float32 on CUDA, got float64; cast "
            "them or call under torch.autocast",
            marks=needs_cuda_build,
        ),
        pytest.param(
            {"head_dim": 513},
            "ValueError: head_dim of q, k, v: expected at most 512 in bfloat16 on CUDA, got 513",
            marks=needs_cuda_build,
        ),
        *(
            pytest.param(
                {"dtype": dtype, "head_dim": 257, "pass_name": pass_name},
                "ValueError: head_dim of q, k, v: expected at most 256 in float32 on CUDA, got 257",
                marks=needs_cuda_build,
            )
            for dtype in ("float32", "tf32")
            for pass_name in ("fwd", "bwd")
        ),
        pytest.param(
            {"smem_opt_in": 16 * 1024},
            "; a block of this device has at most 16384",
            marks=needs_cuda_build,
        ),
    ],
)
def test_a_problem_without_a_kernel_is_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    decision = decide(**changes)
    assert decision["kernel"] is None
    assert sentence in f"{decision['exception']}: {decision['error']}"


@needs_cuda_build
def test_every_size_of_shared_memory_runs_every_problem_and_every_built_row_is_chosen() -> None:
    chosen = {
        decide(pass_name=pass_name, dtype=dtype, head_dim=head_dim, on_cuda=False)["kernel"]
        for pass_name in ("fwd", "bwd")
        for dtype in ("bfloat16", "float16", "float32", "float64")
        for head_dim in (1, 512)
    }
    devices = [(CAPABILITIES[0], smem_opt_in, "sm80") for smem_opt_in in SHARED_MEMORY]
    if HOPPER in CAPABILITIES:
        devices.append((HOPPER, SHARED_MEMORY[-1], ""))
    for compute_capability, smem_opt_in, family in devices:
        for pass_name in ("fwd", "bwd"):
            for dtype, largest in LARGEST_HEAD_DIM.items():
                head_dims = range(1, largest + 1)
                scores = ((False, False), (True, False), (True, True))
                for head_dim, (general_scores, softcap) in itertools.product(head_dims, scores):
                    with only(family):
                        decision = decide(
                            pass_name=pass_name,
                            dtype=dtype,
                            head_dim=head_dim,
                            general_scores=general_scores,
                            softcap=softcap,
                            compute_capability=compute_capability,
                            smem_opt_in=smem_opt_in,
                        )
                    assert decision["kernel"], decision
                    chosen.add(decision["kernel"])
    assert {row["name"] for row in _C.kernel_table() if row["built"]} <= chosen


def test_reasons_name_every_row_of_the_pass() -> None:
    decision = decide(on_cuda=False)
    rows = {row["name"] for row in _C.kernel_table() if row["pass"] == "fwd"}
    assert set(decision["reasons"]) == rows
    assert decision["reasons"][decision["kernel"]] == "runs"
    assert decision["reasons"]["flash_fwd_cpu_float32_d512_window_general_64x64"] == (
        "for float32, not bfloat16"
    )


def test_the_table_tells_how_a_row_is_tiled() -> None:
    fields = (
        "name family pass dtype head_dim mask score softcap tile_m tile_n warps blocks "
        "smem_bytes built"
    )
    for row in _C.kernel_table():
        assert set(row) == set(fields.split())
        assert row["name"].endswith(f"_{row['tile_m']}x{row['tile_n']}")


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not_run"),
    [
        (["sm_80"], [80, 86, 89], [75, 90, 100, 120]),
        (["sm_90a"], [90], [80, 89, 100, 120]),
        (["sm_86"], [86, 89], [80, 90]),
        (["compute_80"], [80, 89, 90, 100, 120], [75]),
        (["sm_80", "compute_80", "sm_90a"], [80, 90, 103, 121], [70, 75]),
        ([], [], [80, 90]),
    ],
)
def test_machine_code_runs_where_cuda_says(
    architectures: list[str], runs: list[int], does_not_run: list[int]
) -> None:
    assert all(_C.runs_on(architectures, capability) for capability in runs)
    assert not any(_C.runs_on(architectures, capability) for capability in does_not_run)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA driver is loaded on this machine: install"):
        _C.query_cuda_device(0)
