# SPDX-License-Identifier: BSD-3-Clause
"""The build as users meet it: what it finds, what it says, and that it never ends up empty."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGET_SECONDS = {"all": 600, "90a": 240}  # on two cores: all targets, one GPU
GIB_FOR_ONE_COMPILER = 2.0  # two run at once on two cores


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, on a machine with no NVIDIA driver, no toolkit and no FA_ variable."""
    for name in ("FA_CUDA_ARCHS", "FA_HEAD_DIMS", "FA_DEBUG", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_program(path: Path, output: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)


def test_archs_are_the_gpus_present(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "nvidia-smi", "9.0\n8.6\n8.6\n7.5\n[N/A]")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert setup_py.choose_archs() == ["86", "90a"]


def test_archs_are_all_targets_without_a_gpu(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.choose_archs() == ["80+ptx", "90a"]
    monkeypatch.setenv("FA_CUDA_ARCHS", "86;120")
    assert setup_py.choose_archs() == ["86", "120"]


@pytest.mark.parametrize("archs", ["75", "80;hopper", "90b"])
def test_archs_without_kernels_are_refused(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, archs: str
) -> None:
    monkeypatch.setenv("FA_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=r"FA_CUDA_ARCHS: expected native, all, none or a list"):
        setup_py.choose_archs()


@pytest.mark.parametrize("head_dims", ["80", "64;abc"])
def test_head_dims_without_kernels_are_refused(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, head_dims: str
) -> None:
    monkeypatch.setenv("FA_HEAD_DIMS", head_dims)
    with pytest.raises(
        SystemExit,
        match=rf"FA_HEAD_DIMS: expected some of 64;96;128;192;256;512, got {head_dims}",
    ):
        setup_py.sources("sm80", suffix=".cu")


def test_a_wrong_cuda_home_is_named(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"CUDA_HOME is {tmp_path}, which does not hold bin/nvcc"):
        setup_py.find_cuda_home()


def test_an_old_torch_is_named(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1")
    with pytest.raises(
        SystemExit, match=r"torch 2\.9\.1 is installed, and 2\.10 or newer is needed"
    ):
        setup_py.find_torch()


def test_gencode(setup_py: ModuleType) -> None:
    flags, names = setup_py.gencode(["80+ptx", "90a"])
    assert flags == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]
    assert names == ["sm_80", "compute_80", "sm_90a"]


def test_head_dims_choose_source_files(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = setup_py.sources("sm80", suffix=".cu")
    monkeypatch.setenv("FA_HEAD_DIMS", "64")
    chosen = setup_py.sources("sm80", suffix=".cu")
    assert "csrc/sm80/fwd_d64.cu" in chosen
    assert set(every) - set(chosen) == {name for name in every if not name.endswith("_d64.cu")}


def test_toolkit_is_found_through_cuda_home(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 12.8, V12.8.61")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_cuda_home() == tmp_path
    assert setup_py.check_toolkit(tmp_path) == "12.8"


def test_an_old_toolkit_is_named(setup_py: ModuleType, tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 12.4, V12.4.131")
    with pytest.raises(SystemExit, match=r"is 12\.4; 12\.8 or newer is needed"):
        setup_py.check_toolkit(tmp_path)


def test_a_driver_older_than_the_toolkit_is_named(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 13.0, V13.0.48")
    write_program(tmp_path / "smi" / "nvidia-smi", "| Driver Version: 570  CUDA Version: 12.8 |")
    monkeypatch.setenv("PATH", str(tmp_path / "smi"), prepend=os.pathsep)
    assert setup_py.check_toolkit(tmp_path) == "13.0"
    assert "supports CUDA 12.8, older than the toolkit's 13.0" in capsys.readouterr().err


def test_a_driver_without_a_toolkit_brings_nvcc(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "find_cuda_home", lambda: None)
    monkeypatch.setattr(setup_py, "driver_present", lambda: True)
    missing, cuda_home, _ = setup_py.plan()
    assert cuda_home is None
    assert "nvidia-cuda-nvcc==13.0.*" in missing


def test_neither_driver_nor_toolkit_is_a_cpu_build(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "find_cuda_home", lambda: None)
    monkeypatch.setattr(setup_py, "driver_present", lambda: False)
    assert setup_py.plan() == (
        [],
        None,
        "CPU-only build: neither a CUDA toolkit nor an NVIDIA driver was found",
    )


def test_a_missing_torch_becomes_a_requirement(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py, "find_torch", lambda: False)
    monkeypatch.setenv("FA_CUDA_ARCHS", "none")
    assert setup_py.plan()[0] == ["torch>=2.10"]


def run(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def make_sdist(folder: Path) -> Path:
    arguments = ["--sdist", "--no-isolation", "--outdir", folder]
    result = run(sys.executable, "-m", "build", *arguments, folder=ROOT, FA_CUDA_ARCHS="none")
    assert result.returncode == 0, result.stdout
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_holds_every_source(tmp_path: Path) -> None:
    with tarfile.open(make_sdist(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "flash_attn_cuda")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu", ".typed"}
    }
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def install(wheel: Path, folder: Path) -> Path:
    """A new virtual environment with the wheel and the torch of these tests; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--no-deps", wheel, folder=folder)
    assert installed.returncode == 0, installed.stdout
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("platlib"))
    return python


def copy_tree(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "build", ".*", "tests", "benchmarks", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=ignore))


@pytest.mark.slow
@pytest.mark.parametrize("archs", BUDGET_SECONDS)
def test_sdist_to_wheel_to_import_within_the_budget(tmp_path: Path, archs: str) -> None:
    """Isolated, as users do it: no second torch, in time and memory; then it runs."""
    sdist = make_sdist(tmp_path)
    start = time.monotonic()
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, sdist),
        folder=tmp_path,
        FA_CUDA_ARCHS=archs,
    )
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stdout
    assert not re.search(r"Collecting (torch|nvidia)", result.stdout)
    assert seconds < BUDGET_SECONDS[archs]
    used = re.search(r"the largest compiler process took ([\d.]+) GiB", result.stdout)
    assert used is not None, result.stdout
    assert float(used[1]) < GIB_FOR_ONE_COMPILER

    python = install(next(tmp_path.glob("*.whl")), tmp_path / "venv")
    code = (
        "import torch, flash_attn_cuda as f; q = torch.ones(1, 4, 1, 8);"
        "assert f.flash_attn_func(q, q, q).eq(1).all(); print(f.__file__)"
    )
    imported = run(python, "-c", code, folder=tmp_path)
    assert imported.returncode == 0, imported.stdout
    assert imported.stdout.strip().startswith(str(tmp_path / "venv"))


@pytest.mark.slow
def test_a_cpu_only_build_says_so_once_and_its_cuda_calls_say_how_to_rebuild(
    tmp_path: Path,
) -> None:
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "."),
        folder=copy_tree(tmp_path),
        FA_CUDA_ARCHS="none",
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("CPU-only build") == 1
    python = install(next(tmp_path.rglob("*.whl")), tmp_path / "venv")
    code = "import flash_attn_cuda as f; print(f.build_info()); f._C.query_cuda_device(0)"
    asked = run(python, "-c", code, folder=tmp_path)
    assert "'cuda_version': None, 'architectures': []" in asked.stdout
    assert "NotImplementedError: this build of flash_attn_cuda has no CUDA kernels" in asked.stdout
    assert "reinstall it from source where nvcc" in asked.stdout


@pytest.mark.slow
def test_a_failed_compile_fails_the_build(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    (tree / "csrc" / "api" / "attention.cpp").write_text("this is not C++\n")
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."),
        folder=tree,
        FA_CUDA_ARCHS="none",
    )
    assert result.returncode != 0
    assert not list(tmp_path.rglob("*.whl"))
