# SPDX-License-Identifier: BSD-3-Clause
"""The C++ tests of csrc/common and csrc/dispatch, built by CMake and run under sanitizers.

Those of the CPU kernels are built too, but take minutes when neither optimised nor run alone; their
Python tests run the same kernels.
"""

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


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp(tmp_path: Path) -> None:
    options = ("-DFA_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DFA_SANITIZE=address,undefined")
    run("cmake", "-S", ROOT, "-B", tmp_path, *options)
    run("cmake", "--build", tmp_path, "--parallel", str(os.cpu_count() or 1))
    tests = ("--tests-regex", "^tests/(common|dispatch)/", "--no-tests=error")
    report = run("ctest", "--test-dir", tmp_path, "--output-on-failure", *tests)
    assert "tests/common/test_window.cpp" in report
    assert "tests/dispatch/test_table.cpp" in report
