# SPDX-License-Identifier: BSD-3-Clause
"""Prove that a binary keeps AVX code inside functions that only run where AVX exists.

The CPU kernels are compiled once per instruction set, each into a namespace of its own. A function
outside those namespaces runs on every x86-64 machine and must not hold a VEX or EVEX instruction:
the linker could, for example, have merged an inline function of two instruction sets into one.

Usage: check_isa.py FILE...   (object files or shared libraries with symbols)
"""

import re
import subprocess
import sys

# The namespace that may hold an instruction, by the widest register or prefix it uses.
AVX_NAMESPACES = ("fa::cpu::avx2::", "fa::cpu::avx512::")
AVX512_NAMESPACES = ("fa::cpu::avx512::",)

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
AVX_MNEMONIC = re.compile(r"v(?!er[rw]$|m(call|launch|resume|xoff|read|write)$)[a-z0-9]+$")
AVX512_REGISTER = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]")


def disassemble(path):
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as objdump:
        yield from objdump.stdout
    if objdump.returncode != 0:
        raise SystemExit(f"objdump failed on {path}")


def misplaced(path):
    """Return the number of functions with AVX code, and (function, instruction) for the first
    misplaced instruction of each function that has one."""
    function = None
    avx_functions = set()
    found = {}
    for line in disassemble(path):
        heading = FUNCTION.match(line.rstrip())
        if heading:
            function = heading.group(1)
            continue
        _, tab, instruction = line.rstrip().partition("\t")
        instruction = instruction.split("<")[0].strip()
        if not tab or not instruction or function is None:
            continue
        if AVX512_REGISTER.search(instruction):
            allowed = AVX512_NAMESPACES
        elif AVX_MNEMONIC.match(instruction.split(maxsplit=1)[0]):
            allowed = AVX_NAMESPACES
        else:
            continue
        avx_functions.add(function)
        if not any(name in function for name in allowed):
            found.setdefault(function, instruction)
    return len(avx_functions), found.items()


def main(paths):
    if not paths:
        raise SystemExit(__doc__)
    avx_functions = 0
    failed = False
    for path in paths:
        count, found = misplaced(path)
        avx_functions += count
        for function, instruction in found:
            failed = True
            print(f"{path}: '{function}' runs on every CPU but contains '{instruction}'")
    if avx_functions == 0:
        failed = True
        print(f"{' '.join(paths)}: no AVX code at all; stripped, or built for another CPU?")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
