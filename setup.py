# SPDX-License-Identifier: BSD-3-Clause
"""Builds the one extension module, flash_attn_cuda._C, from csrc.

Environment variables:
    FA_CUDA_ARCHS  GPU code to build: "native" (the GPUs present; the default where there is one),
                   "all" (every target; the default where there is none), "none" (a CPU-only build),
                   or a list such as "80+ptx;90a", where +ptx adds code that the driver compiles for
                   newer GPUs.
    FA_HEAD_DIMS   head dimensions whose CUDA kernels to build, for example "64;128"; default all.
    FA_DEBUG       1: no optimisation, debug information.
    CUDA_HOME      the CUDA toolkit; default the one of the nvcc on PATH, then /usr/local/cuda,
                   then PyPI's packages.
    MAX_JOBS       compilers running at once; default one a core.

No toolkit and no NVIDIA driver: a CPU-only build. A driver and no toolkit: nvcc comes from PyPI as
a build requirement. A compile error fails the installation.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
# The stable ABI of torch 2.10: the binary serves every newer torch.
TORCH_TARGET_VERSION = "0x020a000000000000"
MINIMUM_CUDA = (12, 8)
ALL_ARCHS = "80+ptx;90a"
NVCC_FROM_PYPI = [
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "cuda-cccl", "nvvm")
]


def say(sentence: str) -> None:
    print(f"flash_attn_cuda: {sentence}", file=sys.stderr, flush=True)


def stop(sentence: str) -> NoReturn:
    sys.exit(f"flash_attn_cuda: {sentence}")


def output_of(*command: str | Path) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def find_torch() -> bool:
    """Makes the target environment's torch importable, also from an isolated build."""
    folders = [sysconfig.get_path("platlib"), *site.getsitepackages()]
    folders += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    # At the end, so that an isolated build's own setuptools stays first.
    sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        import torch
    except ModuleNotFoundError:
        return False
    if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
        stop(f"torch {torch.__version__} is installed, and 2.10 or newer is needed: upgrade torch")
    return True


# --- the CUDA toolkit and the GPUs ---


def driver_present() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def find_cuda_home() -> Path | None:
    # An nvcc on PATH may be a wrapper script far from its toolkit: the headers tell.
    parts = ("bin/nvcc", "include/cuda_runtime_api.h")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and not all((Path(named) / part).exists() for part in parts):
        stop(f"CUDA_HOME is {named}, which does not hold {' and '.join(parts)}")
    on_path = shutil.which("nvcc")
    homes = [named, on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    homes += [home for folder in sys.path for home in Path(folder or ".").glob("nvidia/cu[0-9]*")]
    found = (Path(home) for home in homes if home and all((Path(home) / p).exists() for p in parts))
    return next(found, None)


def check_toolkit(home: Path) -> str:
    text = output_of(home / "bin/nvcc", "--version")
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        stop(f"{home / 'bin/nvcc'} did not tell its version")
    version = (int(match[1]), int(match[2]))
    if version < MINIMUM_CUDA:
        stop(
            f"the CUDA toolkit in {home} is {version[0]}.{version[1]}; "
            f"{MINIMUM_CUDA[0]}.{MINIMUM_CUDA[1]} or newer is needed. Point CUDA_HOME at a newer "
            "one, or set FA_CUDA_ARCHS=none for a CPU-only build"
        )
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", output_of("nvidia-smi"))
    if driver and int(driver[1]) < version[0]:
        say(
            f"WARNING: the NVIDIA driver of this machine supports CUDA {driver[1]}.{driver[2]}, "
            f"older than the toolkit's {version[0]}.{version[1]}: what is built here will not run "
            "here until the driver is updated"
        )
    return f"{version[0]}.{version[1]}"


def choose_archs() -> list[str]:
    """FA_CUDA_ARCHS as a list like ["80+ptx", "90a"]."""
    wanted = os.environ.get("FA_CUDA_ARCHS", "").strip() or "native"
    if wanted == "native":
        present = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        capabilities = {int(a + b) for a, b in re.findall(r"(\d+)\.(\d)", present)}
        wanted = ";".join(f"{c}a" if c == 90 else str(c) for c in sorted(capabilities) if c >= 80)
    archs = re.split(r"[;, ]+", ALL_ARCHS if wanted in ("", "all") else wanted)
    for arch in archs:
        if not re.fullmatch(r"([89]\d|1\d\d)(a|\+ptx)?", arch):
            stop(
                "FA_CUDA_ARCHS: expected native, all, none or a list of 80 and newer like "
                f"{ALL_ARCHS}, got {arch}"
            )
    return archs


def gencode(archs: list[str]) -> tuple[list[str], list[str]]:
    """nvcc's flags, and what they build, for example ["sm_80", "compute_80", "sm_90a"]."""
    flags, names = [], []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        code = [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(code)}]")
        names += code
    return flags, names


# --- the extension ---


def sources(*folders: str, suffix: str) -> list[str]:
    csrc = ROOT / "csrc"
    found = [path for name in folders for path in sorted((csrc / name).glob(f"*{suffix}"))]
    names = {path: re.search(r"_d(\d+)\.cu$", path.name) for path in found}
    head_dim = {path: match[1] for path, match in names.items() if match}
    wanted = set(re.findall(r"[^;, ]+", os.environ.get("FA_HEAD_DIMS", "")))
    if head_dim and not wanted <= set(head_dim.values()):
        every = ";".join(sorted(set(head_dim.values()), key=int))
        stop(f"FA_HEAD_DIMS: expected some of {every}, got {os.environ['FA_HEAD_DIMS']}")
    chosen = [path for path in found if not wanted or head_dim.get(path) in {None, *wanted}]
    return [str(path.relative_to(ROOT)) for path in chosen]


def make_extension(cuda_home: Path | None, archs: list[str]) -> Extension:
    import pybind11
    from torch.utils import cpp_extension

    debug = os.environ.get("FA_DEBUG") == "1"
    system_includes = [pybind11.get_include(), *cpp_extension.include_paths()]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    files = sources("common", "cpu", "dispatch", "api", suffix=".cpp")
    libraries, library_dirs, nvcc = ["torch_cpu"], cpp_extension.library_paths(), []
    if cuda_home is not None:
        families = ["sm80", "sm90"] if "90a" in archs else ["sm80"]
        files += sources("support", *families, suffix=".cpp")
        files += sources("support", *families, suffix=".cu")
        flags, names = gencode(archs)
        defines.append(f"-DFA_COMPILED_ARCHS={','.join(names)}")
        if cuda_home != Path("/usr"):  # the compiler's own; naming it would reorder its headers
            system_includes.append(str(cuda_home / "include"))
        libraries += ["cudart_static", "rt", "pthread", "dl"]
        library_dirs += [str(cuda_home / "lib64"), str(cuda_home / "lib")]
        nvcc = [*flags, "-std=c++20", "-Xcompiler=-fvisibility=hidden"]
        nvcc += ["-G", "-O0"] if debug else ["-O3"]
    cxx = ["-std=c++20", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT}=.", *defines]
    for folder in system_includes:  # a path in a message would be of no use elsewhere
        cxx += [f"-isystem{folder}", f"-fmacro-prefix-map={folder}=."]
    cxx += ["-O0", "-g"] if debug else ["-O3", "-g0"]
    return Extension(
        "flash_attn_cuda._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hc]*"))],
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[] if debug else ["-Wl,--strip-debug"],
        language="c++",
    )


def make_build_command(cuda_home: Path | None, summary: str) -> type:
    from torch.utils import cpp_extension

    # Under a CPU-only torch this is None, and nvcc would not be found. The check that nvcc's major
    # version is torch's has no point with a static CUDA runtime and torch's stable ABI.
    cpp_extension.CUDA_HOME = str(cuda_home) if cuda_home else None
    cpp_extension._check_cuda_version = lambda *_: None
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            say(summary)
            if self.inplace or getattr(self, "editable_mode", False):  # for developers: incremental
                self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}")
            self.force = True  # ninja knows better what is out of date
            start = time.monotonic()
            super().build_extensions()
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            say(
                f"built in {time.monotonic() - start:.0f} s; the largest compiler process took "
                f"{largest:.1f} GiB"
            )

    return BuildExtension


def plan() -> tuple[list[str], Path | None, str]:
    """What is missing to build, the CUDA toolkit to build with (None: CPU only), and a summary."""
    missing = [] if find_torch() else ["torch>=2.10"]
    if os.environ.get("FA_CUDA_ARCHS", "").strip() == "none":
        return missing, None, "CPU-only build, as FA_CUDA_ARCHS=none asks"
    cuda_home = find_cuda_home()
    if cuda_home is not None:
        version = check_toolkit(cuda_home)
        return missing, cuda_home, f"CUDA {version} of {cuda_home}, for {';'.join(choose_archs())}"
    if driver_present():
        return missing + NVCC_FROM_PYPI, None, "an NVIDIA driver, but no CUDA toolkit"
    return missing, None, "CPU-only build: neither a CUDA toolkit nor an NVIDIA driver was found"


def main() -> None:
    missing, cuda_home, summary = plan()
    arguments: dict[str, object] = {"setup_requires": missing}  # pip installs these, if isolated
    if not missing:
        arguments["ext_modules"] = [make_extension(cuda_home, choose_archs() if cuda_home else [])]
        arguments["cmdclass"] = {"build_ext": make_build_command(cuda_home, summary)}
    elif {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"} & set(sys.argv):
        stop(
            f"{summary}. To build, install {' '.join(missing)}, or let pip do so "
            "by leaving out --no-build-isolation; FA_CUDA_ARCHS=none builds for the CPU alone"
        )
    setup(**arguments)


if __name__ == "__main__":
    main()
