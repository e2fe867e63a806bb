# SPDX-License-Identifier: BSD-3-Clause
"""A build made here must not die of an illegal instruction on an older x86-64 CPU."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_cuda import _C

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has vector families"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
]
CHECK = Path(__file__).with_name("check_isa.py")


def check(path: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECK, path], capture_output=True, text=True)


def test_avx_code_is_only_where_avx_was_asked_for() -> None:
    result = check(_C.__file__)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_misplaced_avx_code_is_found(tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text("void twice(float* x) { for (int i = 0; i < 8; ++i) x[i] *= 2; }\n")
    flags = ["-O3", "-mavx2", "-c", source, "-o", tmp_path / "bad.o"]
    subprocess.run(["g++", *flags], check=True)
    result = check(tmp_path / "bad.o")
    assert result.returncode == 1
    assert "'twice(float*)' runs on every CPU but contains" in result.stdout
