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


def violations(path):
    """Yield (function, instruction) for the first misplaced instruction of each function, and
    raise SystemExit when nothing was there to be checked."""
    function = None
    reported = None
    avx_functions = set()
    for line in disassemble(path):
        heading = FUNCTION.match(line.rstrip())
        if heading:
            function = heading.group(1)
            continue
        _, tab, instruction = line.rstrip().partition("\t")
        if not tab or function is None:
            continue
        instruction = instruction.split("<")[0]
        mnemonic = instruction.split(maxsplit=1)[0] if instruction.split() else ""
        if AVX512_REGISTER.search(instruction):
            allowed = AVX512_NAMESPACES
        elif AVX_MNEMONIC.match(mnemonic):
            allowed = AVX_NAMESPACES
        else:
            continue
        avx_functions.add(function)
        if function != reported and not any(name in function for name in allowed):
            reported = function
            yield function, instruction.strip()
    if not avx_functions:
        raise SystemExit(f"{path}: no AVX code at all; was it stripped or built for another CPU?")


def main(paths):
    if not paths:
        raise SystemExit(__doc__)
    failed = False
    for path in paths:
        for function, instruction in violations(path):
            failed = True
            print(f"{path}: '{function}' runs on every CPU but contains '{instruction}'")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
