# SPDX-License-Identifier: BSD-3-Clause
"""The C++ tests, built by CMake: host logic under sanitizers, CPU kernels as users get them, and
under sanitizers where lengths and rules hold anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def configure_and_build(folder: Path, *options: str, target: str = "all") -> None:
    run("cmake", "-S", ROOT, "-B", folder, "-DFA_CUDA=OFF", *options)
    run("cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count() or 1))


def run_tests(folder: Path, name: str) -> str:
    return run("ctest", "--test-dir", folder, "--output-on-failure", "-R", name, "--no-tests=error")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
]


def test_host_logic_and_malformed_contents_under_sanitizers(tmp_path: Path) -> None:
    configure_and_build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", "-DFA_SANITIZE=address,undefined")
    report = run_tests(tmp_path, "^tests/((common|dispatch)/|kernels/test_malformed)")
    assert "tests/common/test_window.cpp" in report
    assert "tests/dispatch/test_table.cpp" in report
    assert "tests/kernels/test_malformed.cpp" in report


def test_cpu_kernels_on_every_instruction_set_of_this_machine(tmp_path: Path) -> None:
    configure_and_build(tmp_path, target="tests_kernels_test_cpu_kernels_cpp")
    report = run_tests(tmp_path, "^tests/kernels/test_cpu_kernels")
    assert "tests/kernels/test_cpu_kernels.cpp" in report
