# SPDX-License-Identifier: BSD-3-Clause
"""The README is true: its tables are the kernel table's, its paths exist, its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import flash_attn_cuda
from flash_attn_cuda import _C
from tests.support.families import only

ROOT = Path(__file__).resolve().parents[2]
BUILD = flash_attn_cuda.build_info()
README = (ROOT / "README.md").read_text()
CSRC_README = (ROOT / "csrc" / "README.md").read_text()


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", ROOT / ".ci" / "support_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_support_tables_are_the_kernel_tables(table: ModuleType) -> None:
    assert table.support_tables() in README, "paste the output of python .ci/support_table.py"


@pytest.mark.skipif(BUILD["cuda_version"] is None, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("pass_name", ["fwd", "bwd"])
def test_support_tables_choose_as_selection_does(table: ModuleType, pass_name: str) -> None:
    capabilities = [n for n in (80, 86, 89, 90, 100, 120) if _C.runs_on(BUILD["architectures"], n)]
    for gpu, (kib, families) in table.GPUS.items():
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
                    on_cuda=True,
                    compute_capability=90 if on_hopper else capabilities[0],
                    smem_opt_in=kib * 1024,
                )
            row = table.first_row(BUILD["kernels"], pass_name, "bfloat16", head_dim, gpu)
            assert decision["kernel"] == row["name"]


@pytest.mark.parametrize("text", [README, CSRC_README], ids=["README.md", "csrc/README.md"])
def test_paths_exist(text: str) -> None:
    folders = (
        "csrc|flash_attn_cuda|tests|benchmarks|common|ptx|device|sm80|sm90|support|cpu|dispatch|api"
    )
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    assert paths
    missing = [p for p in paths if not ((ROOT / p).exists() or (ROOT / "csrc" / p).exists())]
    assert not missing


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_no_figure_is_missing() -> None:
    assert not re.findall(r"@\w+@", README)
