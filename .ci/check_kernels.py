# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every CUDA source for every target and fails on what would make a kernel slow without a
word.

Spills, local memory and stack frames fail, and so do ptxas' C75xx messages (wgmma serialised,
setmaxnreg ignored), which ptxas prints as information only. Prints how many registers each kernel
takes on each target.

    python .ci/check_kernels.py [TARGET ...]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["80", "86", "89", "90a", "120"]
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Icsrc", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]

# {kSm80, kForward,  kBFloat16,  64, kWindow,  128,  128, ...
ROW = re.compile(r"^ *\{k\w+, +k\w+, +k(\w+), +(\d+), +k\w+, +(\d+), +(\d+),", re.MULTILINE)
# A mangled name, of a template over a row of the table or over a type.
KERNEL = re.compile(r"(flash_[a-z0-9_]+)I(?:\w*?TraitsILi(\d+)E)?")

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
REGISTERS = re.compile(r"Used (\d+) registers")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
PERFORMANCE = re.compile(r"\(C75\d\d\)")


@dataclass
class Report:
    """Of one source for one target."""

    target: str
    registers: dict[str, int] = field(default_factory=dict)  # by kernel, the most of its dtypes
    faults: list[str] = field(default_factory=list)


def nvcc() -> str:
    sys.path.insert(0, str(ROOT))
    import setup  # finds the toolkit as the build does

    home = setup.find_cuda_home()
    return str(home / "bin/nvcc") if home else sys.exit("check_kernels: no CUDA toolkit was found")


def label(mangled: str, rows: list[tuple[str, ...]]) -> tuple[str, str]:
    """The kernel and its dtype, as ("flash_fwd_sm80 d64 128x128", "BFloat16")."""
    match = KERNEL.search(mangled)
    if match is None or match[2] is None:
        return match[1] if match else mangled, ""
    dtype, head_dim, tile_m, tile_n = rows[int(match[2])]
    return f"{match[1]} d{head_dim} {tile_m}x{tile_n}", dtype


def compile_source(
    compiler: str, source: Path, target: str, folder: Path, rows: list[tuple[str, ...]]
) -> Report:
    arch = f"-gencode=arch=compute_{target},code=sm_{target}"
    output = folder / f"{source.parent.name}_{source.stem}_{target}.cubin"
    command = [compiler, *FLAGS, arch, str(source.relative_to(ROOT)), "-o", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = result.stdout + result.stderr
    where = f"{source.relative_to(ROOT)} for sm_{target}"
    report = Report(target)
    if result.returncode:
        report.faults.append(f"{where} does not compile:\n{log}")
        return report
    kernel, dtype = "", ""
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernel, dtype = label(match[1], rows)
        if (match := FRAME.search(line)) and any(int(number) for number in match.groups()):
            report.faults.append(f"sm_{target}: {kernel} {dtype}: {match[0]}")
        if PERFORMANCE.search(line):
            report.faults.append(f"sm_{target}: {kernel} {dtype}: {line.strip()}")
        if match := REGISTERS.search(line):
            report.registers[kernel] = max(int(match[1]), report.registers.get(kernel, 0))
    if not report.registers:
        report.faults.append(f"{where}: no kernel was compiled")
    return report


def head_dim(source: Path) -> int:
    match = re.search(r"_d(\d+)$", source.stem)
    return int(match[1]) if match else 0


def print_registers(reports: list[Report], targets: list[str]) -> None:
    registers: dict[str, dict[str, int]] = {}
    for report in reports:
        for kernel, count in report.registers.items():
            registers.setdefault(kernel, {})[report.target] = count
    width = max(map(len, registers), default=0)
    print(f"{'registers':{width}}", *(f"sm_{target:4}" for target in targets))
    for kernel, counts in registers.items():
        print(f"{kernel:{width}}", *(f"{counts.get(target, '-'):>5}  " for target in targets))


def main() -> None:
    targets = sys.argv[1:] or TARGETS
    compiler = nvcc()
    rows = ROW.findall((ROOT / "csrc/dispatch/kernel_table.h").read_text())
    # The slowest to compile first, so that none of them is left alone at the end.
    sources = sorted((ROOT / "csrc").rglob("*.cu"), key=head_dim, reverse=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_source, compiler, source, target, Path(folder), rows)
            for source in sources
            for target in targets
        ]
        reports = [job.result() for job in jobs]
    reports.sort(key=lambda report: targets.index(report.target))
    print_registers(reports, targets)
    faults = [fault for report in reports for fault in report.faults]
    print(f"check_kernels: {len(sources)} files for {len(targets)} targets, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
