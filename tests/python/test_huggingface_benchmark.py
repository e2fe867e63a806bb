# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/huggingface.py: that it trains what it says, and writes what it measured."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.operators import CountOperators

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--device", "cpu", "--layers", "1", "--width", "64", "--seqlens", "32", "--tokens", "64"]
SHORT = ["--steps", "2", "--warmup", "1", "--compiled", "no", "--commit", "abc"]


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("huggingface")


def _rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "huggingface.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_attention_trains_the_same_model(huggingface: ModuleType, tmp_path: Path) -> None:
    with CountOperators() as count:
        huggingface.main([*SMALL, *SHORT, "--dropout", "0", "--out", str(tmp_path)])
    assert (count.forward, count.backward) == (3, 3)  # of one layer, in ours alone
    rows = _rows(tmp_path)
    assert [row["attention"] for row in rows] == ["eager", "sdpa", "fa_cuda"]
    for row in rows:
        assert (row["status"], row["batch"], row["commit"]) == ("ok", "2", "abc")
        assert float(row["ktokens_per_s"]) == pytest.approx(64 / float(row["step_ms"]), rel=1e-2)
        for loss in ("first_loss", "last_loss"):
            assert float(row[loss]) == pytest.approx(float(rows[0][loss]), abs=2e-4)
    assert float(rows[0]["last_loss"]) < float(rows[0]["first_loss"])


def test_a_run_that_fails_says_why(
    huggingface: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(huggingface, "make_model", fail)
    huggingface.main([*SMALL, *SHORT, "--attention", "sdpa", "--out", str(tmp_path)])
    (row,) = _rows(tmp_path)
    assert "no such luck" in row["status"]
    assert row["step_ms"] == ""


def test_lengths_that_do_not_fill_a_step_are_refused(huggingface: ModuleType) -> None:
    with pytest.raises(SystemExit):
        huggingface.parse(["--tokens", "100", "--seqlens", "64"])
