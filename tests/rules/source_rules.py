# SPDX-License-Identifier: BSD-3-Clause
"""The rules of this source tree that no compiler checks.

Run as a script it prints one line per finding and fails where there is any. A rule is a function
from a file to its findings; to add one, write it, list it in RULES, and give the test a snippet
that breaks it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Layer of csrc -> what its quoted includes may begin with.
TABLES = ("dispatch/kernel_table.h", "dispatch/registry.h")
BLOCKS = ("device/", "ptx/", "common/")
LAYERS: dict[str, tuple[str, ...]] = {
    "common": ("common/",),
    "ptx": ("ptx/", "common/"),
    "device": BLOCKS,
    "sm80": ("sm80/", "support/", *BLOCKS, *TABLES),
    "sm90": ("sm90/", "support/", *BLOCKS, *TABLES),
    "support": ("support/", *BLOCKS, *TABLES),
    "cpu": ("cpu/", "common/", *TABLES),
    "dispatch": ("dispatch/", "common/"),
    "api": ("api/", "dispatch/", "common/", "cpu/isa.h"),
}

# Headers from outside: which layers may include them, by their beginning.
TORCH = ("torch/", "ATen/", "c10/")
STABLE_TORCH = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
CUDA = ("cuda", "cub/", "thrust/", "cooperative_groups", "nv/", "mma.h")
CUDA_NUMBERS = ("cuda_bf16.h", "cuda_fp16.h")
CUDA_LAYERS = ("sm80", "sm90", "support")
CUDA_NUMBER_LAYERS = ("common", "ptx", "device", *CUDA_LAYERS)

TOP_LEVEL = {
    *("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "MANIFEST.in"),
    *("README.md", "LICENSE", "csrc", "flash_attn_cuda", "tests", "benchmarks"),
}

# The first pattern that matches a path gives its longest length in lines.
SIZE_LIMITS = (
    ("setup.py", 260),
    ("README.md", 300),
    ("CMakeLists.txt", 90),
    ("csrc/README.md", 120),
    ("csrc/common/*", 160),
    ("csrc/ptx/*", 160),
    ("csrc/device/*", 160),
    ("csrc/*", 450),
)
LARGEST_BYTES = 200_000

PRINTING_ALLOWED = (
    *("setup.py", ".ci/*", "tests/*", "benchmarks/*"),
    *("flash_attn_cuda/__main__.py", "flash_attn_cuda/demo/*"),
)

CPP = (".h", ".cpp", ".cu", ".cuh")
HASH_COMMENTED = ("CMakeLists.txt", "Makefile", ".ci/run")


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence}"


# Comments, string literals and character literals; an apostrophe inside a number begins none.
LEXEME = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | R"(?P<fence>\w*)\(.*?\)(?P=fence)"
      | "(?:\\.|[^"\\\n])*"
      | (?<!\w)'(?:\\.|[^'\\\n])+'""",
    re.DOTALL | re.VERBOSE,
)


def blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


@dataclass(frozen=True)
class File:
    path: str  # from the root, with forward slashes
    text: str

    @property
    def layer(self) -> str:
        """The folder of csrc that holds this file, or nothing."""
        parts = self.path.split("/")
        return parts[1] if parts[0] == "csrc" and len(parts) > 2 else ""

    @property
    def is_cpp(self) -> bool:
        return self.path.endswith(CPP)

    @property
    def is_csrc(self) -> bool:
        return self.is_cpp and self.path.startswith("csrc/")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def uncommented(self) -> str:
        return LEXEME.sub(lambda m: blank(m[0]) if m["comment"] else m[0], self.text)

    @cached_property
    def code(self) -> str:
        """The text without comments and literals, every other character in its place."""
        return LEXEME.sub(lambda m: blank(m[0]), self.text)

    def at(self, offset: int, sentence: str) -> Finding:
        return Finding(self.path, self.text.count("\n", 0, offset) + 1, sentence)


Rule = Callable[[File], Iterator[Finding]]


def known_places(file: File) -> Iterator[Finding]:
    top = file.path.split("/")[0]
    if not top.startswith(".") and top not in TOP_LEVEL:
        yield file.at(0, f"the top level holds no {top}")
    if top == "csrc" and file.path != "csrc/README.md" and file.layer not in LAYERS:
        yield file.at(0, f"csrc has no layer {file.layer or 'for loose files'}")


def include_direction(file: File) -> Iterator[Finding]:
    if not file.is_csrc or file.layer not in LAYERS:
        return
    pattern = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"])([^>\"\n]+)", re.MULTILINE)
    for match in pattern.finditer(file.uncommented):
        quoted, header = match[1] == '"', match[2]
        if quoted and not header.startswith(LAYERS[file.layer]):
            yield file.at(match.start(), f"{file.layer} may not include {header}")
        if not quoted and not may_include_system(file.layer, header):
            yield file.at(match.start(), f"{file.layer} may not include <{header}>")


def may_include_system(layer: str, header: str) -> bool:
    if header.startswith("pybind11/"):
        return layer == "api"
    if header.startswith(TORCH):
        return layer == "api" and header.startswith(STABLE_TORCH)
    if header in CUDA_NUMBERS:
        return layer in CUDA_NUMBER_LAYERS
    if header.startswith(CUDA):
        return layer in CUDA_LAYERS
    return header.split("/")[0] not in LAYERS


def asm_only_in_ptx(file: File) -> Iterator[Finding]:
    if file.is_csrc and file.layer != "ptx":
        for match in re.finditer(r"\b(?:asm|__asm|__asm__)\b", file.code):
            yield file.at(match.start(), "asm belongs in csrc/ptx")


def launches_only_in_launchers(file: File) -> Iterator[Finding]:
    if file.is_csrc and file.layer != "support" and not fnmatch(file.path, "csrc/sm*/launch.cuh"):
        for match in re.finditer("<<<", file.code):
            yield file.at(match.start(), "kernels are launched in sm*/launch.cuh and in support")


def known_pragmas(file: File) -> Iterator[Finding]:
    if not file.is_csrc:
        return
    known = r"once$|unroll\b|nv_diag"
    if file.layer == "cpu":
        known += (
            r"|(?:GCC|clang)\s+(?:target|attribute|diagnostic|unroll|push_options|pop_options)\b"
        )
    pragma = r"^[ \t]*#[ \t]*pragma[ \t]+([^\n]*?)[ \t]*$|\b_Pragma[ \t]*\([ \t]*\"([^\"\n]*)"
    for match in re.finditer(pragma, file.uncommented, re.MULTILINE):
        text = match[1] or match[2]
        if not re.match(known, text):
            yield file.at(match.start(), f"unknown #pragma {text}")


def no_empty_if_constexpr(file: File) -> Iterator[Finding]:
    if not file.is_cpp:
        return
    for match in re.finditer(r"\bif\s+constexpr\s*\(", file.code):
        depth, end = 1, match.end()
        while depth > 0 and end < len(file.code):
            depth += {"(": 1, ")": -1}.get(file.code[end], 0)
            end += 1
        if file.code[end:].lstrip().startswith(";"):
            yield file.at(match.start(), "this if constexpr guards nothing but a semicolon")


def no_exit_no_output(file: File) -> Iterator[Finding]:
    if file.is_csrc:
        banned = r"\b(?:exit|abort|assert|v?[fs]?n?printf)\s*\(|\bstd\s*::\s*(?:cout|cerr|clog)\b"
        for match in re.finditer(banned, file.code):
            name = match[0].rstrip("( ")
            yield file.at(match.start(), f"the library throws fa::Error; it has no {name}")


def no_commented_out_code(file: File) -> Iterator[Finding]:
    if file.is_cpp:
        for number, line in enumerate(file.lines, 1):
            text = line.strip()
            if text.startswith("//") and text.endswith((";", "{")):
                yield Finding(file.path, number, "this comment looks like code")


def headers_are_modest(file: File) -> Iterator[Finding]:
    if not file.path.endswith((".h", ".cuh")):
        return
    for match in re.finditer(r"\busing\s+namespace\b", file.code):
        yield file.at(match.start(), "a header may not say using namespace")
    if not re.search(r"^#pragma once$", file.text, re.MULTILINE):
        yield file.at(0, "a header needs #pragma once")


def size_limits(file: File) -> Iterator[Finding]:
    limit = next((limit for path, limit in SIZE_LIMITS if fnmatch(file.path, path)), None)
    length = file.text.count("\n")
    if limit is not None and length > limit:
        yield Finding(file.path, limit + 1, f"{length} lines, more than {limit}")
    if len(file.text) > LARGEST_BYTES:
        yield file.at(0, f"{len(file.text)} bytes, more than {LARGEST_BYTES}")


def plain_text(file: File) -> Iterator[Finding]:
    for number, line in enumerate(file.lines, 1):
        if not line.isascii():
            yield Finding(file.path, number, "not ASCII")
        if line != line.rstrip():
            yield Finding(file.path, number, "space at the end of the line")
    if file.text and (not file.text.endswith("\n") or file.text.endswith("\n\n")):
        yield Finding(file.path, len(file.lines), "a file ends with one newline")


def license_first(file: File) -> Iterator[Finding]:
    hashed = file.path.endswith(".py") or file.path in HASH_COMMENTED
    if not file.is_cpp and not hashed:
        return
    line = 1 if file.text.startswith("#!") else 0
    expected = f"{'#' if hashed else '//'} SPDX-License-Identifier: BSD-3-Clause"
    if file.lines[line : line + 1] != [expected]:
        yield Finding(file.path, line + 1, f"the first line is '{expected}'")


def names_no_machine(file: File) -> Iterator[Finding]:
    machine = re.compile(
        r"""(?<![\w./)}~-])/(?:home|work|root|Users|scratch)/\w
          | index-url["']?\s*[=:]?\s*["']?https?://
          | https?://[\w.-]*(?:mirror|registry|artifactory|localhost)""",
        re.VERBOSE,
    )
    for match in machine.finditer(file.text):
        yield file.at(match.start(), "names a machine's path or a package host")


def python_prints_nothing(file: File) -> Iterator[Finding]:
    if not file.path.endswith(".py") or any(fnmatch(file.path, p) for p in PRINTING_ALLOWED):
        return
    for node in ast.walk(ast.parse(file.text, file.path)):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Name) and function.id == "print":
            yield Finding(file.path, function.lineno, "the package prints nothing")


RULES: tuple[Rule, ...] = (
    known_places,
    include_direction,
    asm_only_in_ptx,
    launches_only_in_launchers,
    known_pragmas,
    no_empty_if_constexpr,
    no_exit_no_output,
    no_commented_out_code,
    headers_are_modest,
    size_limits,
    plain_text,
    license_first,
    names_no_machine,
    python_prints_nothing,
)


def tree(root: Path) -> Iterable[str]:
    """Paths of the project: what git tracks or would track; without git, what lies there."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
        return sorted(set(filter(None, os.fsdecode(listing).split("\0"))))
    return sorted(walk(root))


def walk(root: Path) -> Iterator[str]:
    made = ("build", "dist", "__pycache__", "PKG-INFO", "setup.cfg", "*.egg-info", "*.so", "*.pyc")
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name in (".ci", ".github")
            or not (name.startswith(".") or any(fnmatch(name, pattern) for pattern in made))
        ]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in made):
                yield (Path(folder) / name).relative_to(root).as_posix()


def check_text(path: str, text: str) -> list[Finding]:
    file = File(path, text)
    return [finding for rule in RULES for finding in rule(file)]


def check_tree(root: Path = ROOT) -> list[Finding]:
    findings: list[Finding] = []
    for path in tree(root):
        if not (root / path).is_file():
            continue  # deleted, and not yet from the index
        content = (root / path).read_bytes()
        if b"\0" in content:  # not text
            findings += [
                *known_places(File(path, "")),
                *size_limits(File(path, " " * len(content))),
            ]
        else:
            findings += check_text(path, content.decode(errors="replace"))
    return findings


if __name__ == "__main__":
    found = check_tree()
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
