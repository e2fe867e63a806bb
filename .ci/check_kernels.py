# SPDX-License-Identifier: BSD-3-Clause
"""Compiles every CUDA source for every target and fails on what would make a kernel slow without a
word.

Spills, local memory, stack frames and static shared memory fail, and so do ptxas' C75xx messages
(wgmma serialised, setmaxnreg ignored), which ptxas prints as information only. Prints how many
registers each kernel takes on each target; the machine code of Hopper's kernels is held to what
sass.py says; a row of the kernel table that does not fit a target's
shared memory never runs there, and is left out.

    python .ci/check_kernels.py [TARGET ...]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / ".ci/loop_budget.json"  # kernel -> instructions of its main loop
SMALL = ("flash_bwd_dq_sm90",)  # kernels beside the main ones, which multiply nothing
# Without registers for a second p: of the last product's time only the rules take some.
WITHOUT_OVERLAP = ("flash_fwd_general_sm90 d128",)
TARGETS = {"80": 163, "86": 99, "89": 99, "90a": 227, "120": 99}  # KiB of shared memory of a block
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Icsrc", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]

# A mangled name, perhaps of a template over a row of the table.
KERNEL = re.compile(r"(flash_[a-z0-9_]+)(?:I\w*?TraitsILi(\d+)E)?")

# Prints the rows of the kernel table: what to call them, and the arguments, in KiB, that they fit.
PRINT_ROWS = r"""
#include <cstdio>
#include <cstdlib>
#include "dispatch/kernel_table.h"
int main(int count, char** limits) {
  for (const fa::KernelConfig& row : fa::table::kRows) {
    std::printf("%s d%d %dx%d %s", name_of(row.dtype), row.head_dim, row.tile_m, row.tile_n,
                name_of(row.score));
    for (int i = 1; i < count; ++i) {
      if (row.fits(1024 * std::atoll(limits[i]))) std::printf(" %s", limits[i]);
    }
    std::puts("");
  }
}
"""

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
REGISTERS = re.compile(r"Used (\d+) registers")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
STATIC_SMEM = re.compile(r"(\d+) bytes smem")  # which the table does not count
PERFORMANCE = re.compile(r"\(C75\d\d\)")


@dataclass(frozen=True)
class Row:
    dtype: str
    name: str
    fits: set[int]  # KiB of shared memory


@dataclass
class Report:
    """Of one source for one target."""

    target: str
    registers: dict[str, int] = field(default_factory=dict)  # by kernel, the most of its dtypes
    faults: list[str] = field(default_factory=list)
    loops: dict[str, int] = field(default_factory=dict)  # instructions of main loops


def nvcc() -> str:
    sys.path.insert(0, str(ROOT))
    import setup  # finds the toolkit as the build does

    home = setup.find_cuda_home()
    return str(home / "bin/nvcc") if home else sys.exit("check_kernels: no CUDA toolkit was found")


def read_rows(compiler: str, folder: Path) -> list[Row]:
    source, program = folder / "rows.cpp", folder / "rows"
    source.write_text(PRINT_ROWS)
    subprocess.run([compiler, "-std=c++20", "-Icsrc", source, "-o", program], cwd=ROOT, check=True)
    limits = sorted(set(TARGETS.values()))
    command = [str(program), *map(str, limits)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    return [Row(line[0], " ".join(line[1:4]), {int(limit) for limit in line[4:]}) for line in lines]


def row_of(mangled: str, rows: list[Row]) -> Row:
    """The row that a kernel instantiates, named after both; kernels of no row run everywhere."""
    match = KERNEL.search(mangled)
    if match is None or match[2] is None:
        return Row("", match[1] if match else mangled, set(TARGETS.values()))
    row = rows[int(match[2])]
    return replace(row, name=f"{match[1]} {row.name}")


def compile_source(
    compiler: str, source: Path, target: str, folder: Path, rows: list[Row]
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
    kernel = Row("", "", set())
    for line in log.splitlines():
        if PERFORMANCE.search(line):
            report.faults.append(f"{where}: {line.strip()}")
        if match := ENTRY.search(line):
            kernel = row_of(match[1], rows)
        if TARGETS[target] not in kernel.fits:
            continue
        if (match := FRAME.search(line)) and any(int(number) for number in match.groups()):
            report.faults.append(f"sm_{target}: {kernel.name} {kernel.dtype}: {match[0]}")
        if (match := STATIC_SMEM.search(line)) and kernel.dtype:
            report.faults.append(f"sm_{target}: {kernel.name} {kernel.dtype}: static, {match[0]}")
        if match := REGISTERS.search(line):
            count = max(int(match[1]), report.registers.get(kernel.name, 0))
            report.registers[kernel.name] = count
    if not report.registers:
        report.faults.append(f"{where}: no kernel was compiled")
    elif source.parent.name == "sm90":
        check_machine_code(report, output, rows)
    return report


def check_machine_code(report: Report, cubin: Path, rows: list[Row]) -> None:
    nvdisasm = sass.find_nvdisasm()
    if nvdisasm is None:
        report.faults.append("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
        return
    budgets = json.loads(BUDGETS.read_text())
    for mangled, code in sass.disassemble(nvdisasm, cubin).items():
        kernel = row_of(mangled, rows)
        multiplies = not kernel.name.startswith(SMALL)
        if multiplies:
            report.loops[kernel.name] = len(code.main_loop())
        overlaps = not kernel.name.startswith(WITHOUT_OVERLAP)
        for fault in sass.faults(code, budgets.get(kernel.name), multiplies, overlaps):
            report.faults.append(f"sm_{report.target}: {kernel.name} {kernel.dtype}: {fault}")


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
    targets = sys.argv[1:] or list(TARGETS)
    compiler = nvcc()
    # The slowest to compile first, so that none of them is left alone at the end.
    sources = sorted((ROOT / "csrc").rglob("*.cu"), key=head_dim, reverse=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = read_rows(compiler, Path(folder))
        jobs = [
            pool.submit(compile_source, compiler, source, target, Path(folder), rows)
            for source in sources
            for target in targets
            if source.parent.name != "sm90" or target == "90a"  # wgmma exists there alone
        ]
        reports = [job.result() for job in jobs]
    reports.sort(key=lambda report: targets.index(report.target))
    print_registers(reports, targets)
    for kernel, length in sorted(loop for report in reports for loop in report.loops.items()):
        print(f"{kernel}: {length} instructions in its main loop")
    faults = [fault for report in reports for fault in report.faults]
    print(f"check_kernels: {len(sources)} files for {len(targets)} targets, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
