# SPDX-License-Identifier: BSD-3-Clause
"""What the machine code of Hopper's kernels must and must not contain.

A kernel moves tiles by TMA and multiplies by wgmma, so UTMALDG and HGMMA occur in it, and neither
HMMA, the products of older GPUs, nor LDL and STL, which are registers spilled to memory; small
kernels around the main ones may have none of these three either. Its main loop is the shortest that
holds both HGMMA and exponentials (MUFU): the one without masks. How many instructions it has, those
included that rarely run because the softmax must raise its base, a budget keeps from growing
unnoticed. Where it waits for its two products one by one (DEPBAR), the exponentials run under the
second, which is before the last wait.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REQUIRED = ("HGMMA", "UTMALDG")
FORBIDDEN = ("HMMA", "LDL", "STL")
WAIT = "WARPGROUP.DEPBAR"

SECTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+(?:\.DEPBAR)?)(.*)")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, without operands, and its loops as ranges of them."""

    opcodes: list[str]
    loops: list[range]

    def main_loop(self) -> list[str]:
        bodies = (self.opcodes[loop.start : loop.stop] for loop in self.loops)
        both = (body for body in bodies if "HGMMA" in body and "MUFU" in body)
        return min(both, key=len, default=[])


def find_nvdisasm() -> str | None:
    """On PATH, or as PyPI's nvidia-cuda-nvdisasm installs it."""
    folders = Path(sysconfig.get_path("platlib")).glob("nvidia/*/bin")
    return shutil.which("nvdisasm") or next(
        (str(folder / "nvdisasm") for folder in folders if (folder / "nvdisasm").exists()), None
    )


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Code]:
    command = [nvdisasm, "-c", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(parse(text))


def parse(text: str) -> Iterator[tuple[str, Code]]:
    """Each kernel's mangled name and code, from what nvdisasm -c prints."""
    name, opcodes, loops, labels = "", [], [], {}
    for line in text.splitlines():
        if match := SECTION.match(line):
            if name:
                yield name, Code(opcodes, loops)
            name, opcodes, loops, labels = match[1], [], [], {}
        elif match := LABEL.match(line):
            labels[match[1]] = len(opcodes)
        elif match := INSTRUCTION.match(line):
            opcodes.append(match[1])
            target = TARGET.search(match[2])
            if match[1] == "BRA" and target and target[1] in labels:  # back to a label seen before
                loops.append(range(labels[target[1]], len(opcodes)))
    if name:
        yield name, Code(opcodes, loops)


def faults(
    code: Code, budget: int | None, multiplies: bool = True, overlaps: bool = True
) -> Iterator[str]:
    """Of a kernel that multiplies, or of a small one that does not and has no main loop; overlaps:
    whether its exponentials are to run under its own last product."""
    for opcode in FORBIDDEN:
        if count := code.opcodes.count(opcode):
            yield f"{count} {opcode} in its machine code"
    if not multiplies:
        return
    for opcode in REQUIRED:
        if opcode not in code.opcodes:
            yield f"no {opcode} in its machine code"
    loop = code.main_loop()
    if budget is None:
        yield f"no budget in .ci/loop_budget.json for its main loop of {len(loop)} instructions"
    elif not 0 < len(loop) <= budget:
        yield f"its main loop has {len(loop)} instructions, and a budget of {budget}"
    late = list(itertools.takewhile(lambda opcode: opcode != WAIT, reversed(loop)))
    if overlaps and loop.count(WAIT) > 1 and late.count("MUFU") > 0:
        yield f"{late.count('MUFU')} of its {loop.count('MUFU')} exponentials follow the products"
