# SPDX-License-Identifier: BSD-3-Clause
"""The README is true: its table is the kernel table's, its paths exist, its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CSRC_README = (ROOT / "csrc" / "README.md").read_text()


def test_support_table_is_the_kernel_tables() -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / ".ci" / "support_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.support_table() in README, "paste the output of python .ci/support_table.py"


@pytest.mark.parametrize("text", [README, CSRC_README], ids=["README.md", "csrc/README.md"])
def test_paths_exist(text: str) -> None:
    folders = (
        "csrc|flash_attn_cuda|tests|benchmarks|common|ptx|device|sm80|support|cpu|dispatch|api"
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
