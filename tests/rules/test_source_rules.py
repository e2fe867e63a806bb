# SPDX-License-Identifier: BSD-3-Clause
"""The tree follows its rules, and every rule can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules import source_rules

SPDX = "SPDX-License-Identifier: BSD-3-Clause\n"
CPP = f"// {SPDX}"
HEADER = f"{CPP}#pragma once\n"
PY = f"# {SPDX}"
HOME = "/ho" + "me/someone/flash"
INDEX = "index-" + "url: https://packages.example.org/simple"

# rule, path, text that breaks it
BAD = [
    ("known_places", "notes.txt", "no\n"),
    ("known_places", "csrc/loose.cpp", CPP),
    ("known_places", "csrc/utils/tools.cpp", CPP),
    ("include_direction", "csrc/common/a.h", HEADER + '#include "device/softmax.cuh"\n'),
    ("include_direction", "csrc/common/a.h", HEADER + "#include <cuda_runtime.h>\n"),
    ("include_direction", "csrc/ptx/a.cuh", HEADER + '#include "device/smem.cuh"\n'),
    ("include_direction", "csrc/device/a.cuh", HEADER + '#include "dispatch/registry.h"\n'),
    ("include_direction", "csrc/device/a.cuh", HEADER + '#include "softmax.cuh"\n'),
    ("include_direction", "csrc/sm80/a.cu", CPP + '#include "sm90/traits.h"\n'),
    ("include_direction", "csrc/sm80/a.cu", CPP + '#include "dispatch/select.h"\n'),
    ("include_direction", "csrc/sm80/a.cu", CPP + "#include <torch/csrc/stable/tensor.h>\n"),
    ("include_direction", "csrc/sm90/a.cu", CPP + '#include "sm80/traits.h"\n'),
    ("include_direction", "csrc/support/a.cu", CPP + '#include "sm80/traits.h"\n'),
    ("include_direction", "csrc/cpu/a.cpp", CPP + '#include "dispatch/select.h"\n'),
    ("include_direction", "csrc/cpu/a.cpp", CPP + "# include <cuda_fp16.h>\n"),
    ("include_direction", "csrc/dispatch/a.cpp", CPP + "#include <cuda_runtime_api.h>\n"),
    ("include_direction", "csrc/dispatch/a.cpp", CPP + '#include "cpu/isa.h"\n'),
    ("include_direction", "csrc/dispatch/a.cpp", CPP + "#include <pybind11/pybind11.h>\n"),
    ("include_direction", "csrc/api/a.cpp", CPP + '#include "cpu/simd.h"\n'),
    ("include_direction", "csrc/api/a.cpp", CPP + "#include <torch/extension.h>\n"),
    ("include_direction", "csrc/api/a.cpp", CPP + "#include <device/softmax.cuh>\n"),
    ("asm_only_in_ptx", "csrc/device/a.cuh", HEADER + 'void f() { asm volatile("nop;"); }\n'),
    ("launches_only_in_launchers", "csrc/sm80/a.cu", CPP + "void f() { g<<<1, 1>>>(); }\n"),
    ("known_pragmas", "csrc/device/a.cuh", HEADER + "#pragma unrol\n"),
    ("known_pragmas", "csrc/device/a.cuh", HEADER + '#pragma GCC target("avx2")\n'),
    ("known_pragmas", "csrc/cpu/a.cpp", CPP + "#pragma omp parallel for\n"),
    ("known_pragmas", "csrc/cpu/a.cpp", CPP + '_Pragma("omp simd")\n'),
    ("no_empty_if_constexpr", "csrc/cpu/a.cpp", CPP + "  if constexpr ((a) || f(b)) ;\n"),
    ("no_exit_no_output", "csrc/cpu/a.cpp", CPP + "void f() { std::exit(1); }\n"),
    ("no_exit_no_output", "csrc/cpu/a.cpp", CPP + "void f() { abort(); }\n"),
    ("no_exit_no_output", "csrc/cpu/a.cpp", CPP + "void f() { assert(true); }\n"),
    ("no_exit_no_output", "csrc/cpu/a.cpp", CPP + 'void f() { fprintf(stderr, "no"); }\n'),
    ("no_exit_no_output", "csrc/cpu/a.cpp", CPP + 'void f() { std::cout << "no"; }\n'),
    ("no_commented_out_code", "csrc/cpu/a.cpp", CPP + "  // run(params);\n"),
    ("no_commented_out_code", "tests/common/a.cpp", CPP + "// if (slow) {\n"),
    ("headers_are_modest", "csrc/cpu/a.h", HEADER + "using namespace std;\n"),
    ("headers_are_modest", "csrc/cpu/a.h", CPP + "struct A {};\n"),
    ("size_limits", "setup.py", PY + "x = 1\n" * 260),
    ("size_limits", "README.md", "more\n" * 301),
    ("size_limits", "CMakeLists.txt", PY + "project()\n" * 90),
    ("size_limits", "csrc/README.md", "more\n" * 121),
    ("size_limits", "csrc/common/a.h", HEADER + "int a();\n" * 159),
    ("size_limits", "csrc/sm80/fwd_kernel.cuh", HEADER + "int a();\n" * 449),
    ("size_limits", "benchmarks/a.csv", "1,2,3,4,5,6,7,8,9\n" * 20_000),
    ("size_limits", "benchmarks/a.png", "\0" * 200_001),
    ("plain_text", "README.md", "na\u00efve\n"),
    ("plain_text", "README.md", "space \n"),
    ("plain_text", "README.md", "returns\r\n"),
    ("plain_text", "README.md", "no newline"),
    ("plain_text", "README.md", "two\n\n"),
    ("license_first", "csrc/cpu/a.cpp", "int a();\n"),
    ("license_first", "flash_attn_cuda/a.py", ""),
    ("license_first", ".ci/run", "#!/bin/sh\nset -e\n"),
    ("license_first", "Makefile", "all:\n"),
    ("names_no_machine", "README.md", f"cd {HOME}\n"),
    ("names_no_machine", ".github/workflows/ci.yml", f"{INDEX}\n"),
    ("python_prints_nothing", "flash_attn_cuda/a.py", PY + "def f():\n    print(1)\n"),
]

# What a rule must not mistake for its prey.
GOOD = [
    ("csrc/ptx/a.cuh", HEADER + '#include "common/math.h"\nvoid f() { asm volatile("nop;"); }\n'),
    ("csrc/device/a.cuh", HEADER + "#include <cuda_bf16.h>\n// asm stays in ptx, exit() nowhere\n"),
    ("csrc/sm80/launch.cuh", HEADER + '#include "support/cuda.h"\nvoid f() { g<<<1, 1>>>(); }\n'),
    ("csrc/sm80/a.cu", CPP + '#include "dispatch/registry.h"\n#pragma unroll\n#pragma unroll 4\n'),
    ("csrc/support/a.cu", CPP + "#include <cuda_runtime.h>\nvoid f() { g<<<1, 1>>>(); }\n"),
    ("csrc/cpu/a.cpp", CPP + '#pragma GCC push_options\n#pragma GCC target("avx2")\n'),
    ("csrc/cpu/a.cpp", CPP + "static_assert(true);\nint i = 1'000'000;  // abort( is a word\n"),
    ("csrc/cpu/a.cpp", CPP + '/* std::cout\n   assert( */ auto s = "printf("; char c = \'"\';\n'),
    ("csrc/cpu/a.cpp", CPP + 'auto s = R"x(asm "<<<)x";\nif constexpr (a) {\n  ;\n}\n'),
    ("csrc/cpu/a.cpp", CPP + "using namespace fa::table;\n// prose; and more prose\n"),
    ("csrc/api/a.cpp", CPP + "#include <torch/csrc/stable/ops.h>\n#include <pybind11/stl.h>\n"),
    ("csrc/sm80/fwd_kernel.cuh", HEADER + "int a();\n" * 448),
    (".ci/run", f"#!/bin/sh\n# {SPDX}set -e\n"),
    ("README.md", "https://example.com/home/page and build/home/x and csrc/work\n"),
    ("flash_attn_cuda/__main__.py", PY + "print(1)\n"),
    ("flash_attn_cuda/a.py", PY + '"""Never call print(x)."""\n'),
]


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text.encode())


def test_the_tree_follows_its_rules() -> None:
    findings = source_rules.check_tree()
    assert not findings, "\n".join(map(str, findings))


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_rule_finds_what_breaks_it(tmp_path: Path, rule: str, path: str, text: str) -> None:
    found = list(getattr(source_rules, rule)(source_rules.File(path, text)))
    assert found
    assert all(1 <= finding.line <= text.count("\n") + 1 for finding in found)
    write(tmp_path, path, text)
    assert set(found) & set(source_rules.check_tree(tmp_path))


def test_every_rule_is_seen_to_fail() -> None:
    assert {rule.__name__ for rule in source_rules.RULES} == {rule for rule, _, _ in BAD}


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path, path: str, text: str) -> None:
    write(tmp_path, path, text)
    assert source_rules.check_tree(tmp_path) == []


def test_a_finding_names_its_line(tmp_path: Path) -> None:
    write(tmp_path, "csrc/cpu/a.cpp", CPP + "/* two\n   lines */\nvoid f() { abort(); }\n")
    [finding] = source_rules.check_tree(tmp_path)
    assert str(finding) == "csrc/cpu/a.cpp:4: the library throws fa::Error; it has no abort"


def test_what_a_build_leaves_behind_is_not_judged(tmp_path: Path) -> None:
    for path in ("build/a.txt", "flash_attn_cuda/_C.so", "PKG-INFO", "x.egg-info/SOURCES.txt"):
        write(tmp_path, path, "made \n")
    assert source_rules.check_tree(tmp_path) == []


def test_git_decides_what_belongs_to_the_tree(tmp_path: Path) -> None:
    try:
        subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    write(tmp_path, ".gitignore", "/scratch.txt\n")
    write(tmp_path, "scratch.txt", "mine \n")
    write(tmp_path, "setup.py", PY + "x = 1 \n")
    assert [finding.path for finding in source_rules.check_tree(tmp_path)] == ["setup.py"]


def test_the_script_judges_this_tree() -> None:
    run = subprocess.run(
        [sys.executable, source_rules.__file__], capture_output=True, text=True, check=False
    )
    findings = source_rules.check_tree()
    assert run.stdout.splitlines() == [str(finding) for finding in findings]
    assert run.returncode == (1 if findings else 0)
