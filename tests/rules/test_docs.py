# SPDX-License-Identifier: BSD-3-Clause
"""The README is true: its tables are the kernel table's, its paths and the tests of its promises
exist, its Python runs, and it names every argument."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import flash_attn_cuda
from flash_attn_cuda import _C
from tests.support import readme_tables
from tests.support.arguments import LATER
from tests.support.families import only

ROOT = Path(__file__).resolve().parents[2]
BUILD = flash_attn_cuda.build_info()
README = (ROOT / "README.md").read_text()
READMES = ("README.md", "csrc/README.md", "benchmarks/README.md")


def test_tables_are_those_of_the_kernels_and_of_the_tests() -> None:
    told = "paste the output of python -m tests.support.readme_tables"
    assert readme_tables.of_features() in README, told
    assert readme_tables.of_tiles() in (ROOT / "benchmarks/README.md").read_text(), told


@pytest.mark.skipif(BUILD["cuda_version"] is None, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("pass_name", ["fwd", "bwd"])
def test_tables_choose_as_selection_does(pass_name: str) -> None:
    capabilities = [n for n in (80, 86, 89, 90, 100, 120) if _C.runs_on(BUILD["architectures"], n)]
    for gpu, (kib, families) in readme_tables.GPUS.items():
        on_hopper = "sm90" in families
        if on_hopper and "sm_90a" not in BUILD["architectures"]:
            continue
        for head_dim in (1, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 512):
            with only("" if on_hopper else "sm80"):
                decision = _C.explain(
                    pass_name=pass_name,
                    dtype="bfloat16",
                    head_dim=head_dim,
                    seqlen_q=1000,
                    seqlen_k=1000,
                    window_left=-1,
                    window_right=0,
                    general_scores=False,
                    softcap=False,
                    on_cuda=True,
                    compute_capability=90 if on_hopper else capabilities[0],
                    smem_opt_in=kib * 1024,
                )
            row = readme_tables.first_row(BUILD["kernels"], pass_name, "bfloat16", head_dim, gpu)
            assert decision["kernel"] == row["name"]


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    folders = (
        "csrc|flash_attn_cuda|tests|benchmarks|common|ptx|device|sm80|sm90|support|cpu|dispatch|api"
    )
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert paths
    missing = [p for p in paths if not ((ROOT / p).exists() or (ROOT / "csrc" / p).exists())]
    folder = (ROOT / name).parent
    missing += [p for p in re.findall(r"\]\(([\w./-]+)\)", text) if not (folder / p).exists()]
    assert not missing


def test_every_promise_names_a_test_that_exists() -> None:
    section = README.split("## Promises\n")[1].split("\n## ")[0]
    _, _, *promises = (line for line in section.splitlines() if line.startswith("|"))
    assert promises
    for promise in promises:
        tests = re.findall(r"\[([\w.]+)::(\w+)\]\((tests/[\w/.]+)\)", promise)
        assert tests, promise
        assert len(tests) == promise.count("]("), promise
        for file, test, path in tests:
            assert Path(path).name == file
            definition = rf"^(?:def|void) {test}\("
            assert re.search(definition, (ROOT / path).read_text(), flags=re.MULTILINE), test


def test_every_argument_is_named() -> None:
    functions = [getattr(flash_attn_cuda, n) for n in dir(flash_attn_cuda) if n.endswith("_func")]
    assert len(functions) == 6
    names = {name for function in functions for name in inspect.signature(function).parameters}
    missing = {name for name in names if not re.search(rf"\b{name}\b", README)}
    assert not missing
    sentence = re.search(r"[^.]*raises NotImplementedError", README)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[0])) == LATER.keys()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}  # later blocks go on from earlier ones
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_no_figure_is_missing() -> None:
    assert not re.findall(r"@\w+@", README)
