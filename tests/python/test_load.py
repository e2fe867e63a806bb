# SPDX-License-Identifier: BSD-3-Clause
"""Imports that cannot work say what to do."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import flash_attn_cuda

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(flash_attn_cuda.__file__).parent


def run_python(
    code: str, folder: Path, *search: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a folder with torch, but without .pth files: no editable installation helps."""
    path = os.pathsep.join(map(str, [*search, sysconfig.get_path("platlib")]))
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the source tree as a fresh clone has it: nothing compiled."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "flash_attn_cuda", tmp_path / "flash_attn_cuda", ignore=ignore)
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    return tmp_path


def test_an_uncompiled_source_tree_that_hides_the_package_says_so(source_tree: Path) -> None:
    result = run_python("import flash_attn_cuda", source_tree)
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: this is flash_attn_cuda's source tree")
    assert str(source_tree) in message
    assert "pip install --no-build-isolation -e ." in message


def test_a_build_for_another_python_says_so(source_tree: Path) -> None:
    (source_tree / "flash_attn_cuda" / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    message = run_python("import flash_attn_cuda", source_tree).stderr.splitlines()[-1]
    assert "was built for another Python (_C.cpython-36m-x86_64-linux-gnu.so" in message
    assert importlib.machinery.EXTENSION_SUFFIXES[0] in message


def test_a_compiled_module_that_does_not_load_says_why(source_tree: Path) -> None:
    module = source_tree / "flash_attn_cuda" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.write_bytes(b"not a library")
    message = run_python("import flash_attn_cuda", source_tree).stderr.splitlines()[-1]
    assert f"flash_attn_cuda's compiled module {module} does not load" in message


def test_an_old_torch_is_named() -> None:
    code = "import torch; torch.__version__ = '2.9.1'; import flash_attn_cuda"
    message = run_python(code, PACKAGE.parent).stderr.splitlines()[-1]
    assert "needs torch 2.10 or newer, and the running torch is 2.9.1" in message


def test_flash_attn_1_beside_us_is_reported(tmp_path: Path) -> None:
    module = tmp_path / f"flash_attn_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.touch()
    result = run_python("import flash_attn_cuda", tmp_path.parent, PACKAGE.parent, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"flash-attn 1.x's compiled module {module} has the same name" in result.stderr
    assert "pip uninstall flash-attn" in result.stderr


def test_import_starts_no_cuda_context_and_leaves_fork_usable() -> None:
    code = (
        "import os, torch, flash_attn_cuda as f\n"
        "assert not torch.cuda.is_initialized()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    q = torch.ones(1, 4, 1, 8)\n"
        "    os._exit(0 if f.flash_attn_func(q, q, q).eq(1).all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    result = run_python(code, PACKAGE.parent, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
