# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every CUDA source for every target and fails on what would make a kernel slow without a
word.

Spills, local memory and stack frames fail, and so do ptxas' C75xx messages (wgmma serialised,
setmaxnreg ignored), which ptxas prints as information only. Ends with a table of registers for each
kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["80", "90a"]
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Icsrc", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
REGISTERS = re.compile(r"Used (\d+) registers")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
PERFORMANCE = re.compile(r"\(C75\d\d\)")


def nvcc() -> str:
    sys.path.insert(0, str(ROOT))
    import setup  # finds the toolkit as the build does

    home = setup.find_cuda_home()
    return str(home / "bin/nvcc") if home else sys.exit("check_kernels: no CUDA toolkit was found")


def compile_source(
    compiler: str, source: Path, target: str, folder: Path
) -> tuple[list[str], list[str]]:
    """Returns the rows of the register table and the faults found."""
    arch = f"-gencode=arch=compute_{target},code=sm_{target}"
    output = folder / f"{source.parent.name}_{source.stem}_{target}.cubin"
    command = [compiler, *FLAGS, arch, str(source.relative_to(ROOT)), "-o", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = result.stdout + result.stderr
    where = f"{source.relative_to(ROOT)} for sm_{target}"
    if result.returncode:
        return [], [f"{where} does not compile:\n{log}"]
    rows, faults, kernel = [], [], ""
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernel = match[1]
        if (match := FRAME.search(line)) and any(int(number) for number in match.groups()):
            faults.append(f"{where}: {kernel}: {match[0]}")
        if PERFORMANCE.search(line):
            faults.append(f"{where}: {kernel}: {line.strip()}")
        if match := REGISTERS.search(line):
            rows.append(f"{int(match[1]):4d} registers  sm_{target:4s} {kernel}")
    if not rows:
        faults.append(f"{where}: no kernel was compiled")
    return rows, faults


def main() -> None:
    compiler = nvcc()
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_source, compiler, source, target, Path(folder))
            for source in sources
            for target in TARGETS
        ]
        results = [job.result() for job in jobs]
    rows = sorted({row for found, _ in results for row in found})
    faults = [fault for _, found in results for fault in found]
    names = subprocess.run(["c++filt"], input="\n".join(rows), capture_output=True, text=True)
    print(names.stdout or "\n".join(rows))
    print(f"check_kernels: {len(rows)} kernels from {len(sources)} files, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
