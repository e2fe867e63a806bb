# SPDX-License-Identifier: BSD-3-Clause
"""The comparison of training gives every attention the same run, and tells their losses apart."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda.reference import standard_attention

pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--device=cpu", "--commit=abc", "--layers=1", "--width=64", "--tokens=128", "--steps=8"]
NAMES = ("flash_attn_cuda", "eager", "sdpa_flash")
ROUNDING = 3e-6  # of a loss, relative, after a few steps in float32


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("training")


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plot")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(
    training: ModuleType, out: Path, *arguments: str
) -> tuple[list[dict[str, str]], dict[str, list[float]]]:
    """The rows, and the losses by length and attention."""
    training.main([*TINY, "--out", str(out), *arguments])
    curves: dict[str, list[float]] = {}
    for row in read(out / "training_losses.csv"):
        curve = curves.setdefault(f"{row['seqlen']} {row['attention']}", [])
        assert int(row["step"]) == len(curve)
        curve.append(float(row["loss"]))
    return read(out / "training.csv"), curves


def test_all_attentions_learn_the_same(
    training: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, curves = measured(training, tmp_path, "--seqlens", "64", "32")
    assert [(row["seqlen"], row["attention"]) for row in rows] == [
        (seqlen, name) for seqlen in ("64", "32") for name in NAMES
    ]
    for row in rows:
        assert (row["status"], row["commit"], row["layers"]) == ("ok", "abc", "1")
        assert int(row["batch"]) * int(row["seqlen"]) == 128
        assert row["peak_gib"] == ""  # counted on CUDA only
        assert float(row["tokens_per_s"]) == pytest.approx(128e3 / float(row["step_ms"]), rel=1e-2)
        losses = curves[f"{row['seqlen']} {row['attention']}"]
        assert len(losses) == 8
        assert losses[0] == pytest.approx(5.545, abs=1e-3)
        assert losses[-1] < losses[0]
        assert losses == pytest.approx(curves[f"{row['seqlen']} eager"], rel=ROUNDING)
        if row["attention"] == "eager":
            assert row["loss_difference"] == row["difference_from"] == ""
        else:
            assert row["difference_from"] == "eager"
            assert float(row["loss_difference"]) < ROUNDING
    assert curves["64 eager"] != curves["32 eager"]
    assert "\n| 32 | sdpa_flash | ok | " in capsys.readouterr().out


@pytest.mark.parametrize("window", [(-1, 1), (15, 0)], ids=["one key ahead", "16 keys"])
def test_another_mask_would_be_seen(
    training: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: tuple[int, int],
) -> None:
    load = training.providers.load

    def masked(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return standard_attention(q, k, v, window_size=window)

    def load_another(name: str) -> Any:
        return load(name) if name == "eager" else training.providers.Provider(masked)

    monkeypatch.setattr(training.providers, "load", load_another)
    arguments = ("--seqlens", "64", "--attention", "flash_attn_cuda", "eager")
    (ours, _), curves = measured(training, tmp_path, *arguments)
    assert curves["64 flash_attn_cuda"] != pytest.approx(curves["64 eager"], rel=10 * ROUNDING)
    assert float(ours["loss_difference"]) > 10 * ROUNDING


def test_running_out_of_memory_is_a_status_and_the_rest_goes_on(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = training.providers.load

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def load_full(name: str) -> Any:
        return training.providers.Provider(full) if name == "eager" else load(name)

    monkeypatch.setattr(training.providers, "load", load_full)
    rows, curves = measured(training, tmp_path, "--seqlens", "64")
    ours, standard, sdpa = rows
    assert (standard["status"], standard["step_ms"]) == ("out of memory", "")
    assert curves.keys() == {"64 flash_attn_cuda", "64 sdpa_flash"}
    assert (ours["status"], ours["difference_from"]) == ("ok", "sdpa_flash")
    assert (sdpa["status"], sdpa["difference_from"]) == ("ok", "")


def test_differences_are_of_running_means(training: ModuleType) -> None:
    curves = {"flash_attn_cuda": [2.0] * 40, "eager": [1.5, 2.5] * 20, "sdpa_flash": [2.25] * 40}
    found = training.differences(curves)
    assert found["flash_attn_cuda"] == {"loss_difference": "0", "difference_from": "eager"}
    assert found["sdpa_flash"] == {"loss_difference": "0.25", "difference_from": "eager"}
    assert "eager" not in found
    assert training.differences({"flash_attn_cuda": [1.0]}) == {}


def test_text_is_what_the_files_hold(
    training: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path, byte in zip(paths, (b"\0", b"\xff"), strict=True):
        path.write_bytes(40 * byte)
    text, name = training.read_text(paths)
    assert (text.tolist(), name) == (40 * [0] + 40 * [255], "80 bytes of b.txt a.txt")
    files = [str(path) for path in paths]
    with pytest.raises(SystemExit, match=r"80 bytes of b\.txt a\.txt are too few"):
        training.main([*TINY, "--out", str(tmp_path), "--seqlens", "128", "--text", *files])
    for wrong in (["--seqlens", "100"], ["--seqlens", "64", "--width", "100"]):
        with pytest.raises(SystemExit):
            training.main([*TINY, *wrong])
        assert "is no multiple of" in capsys.readouterr().err


def test_the_figure_holds_every_curve(
    training: ModuleType, plot: ModuleType, tmp_path: Path
) -> None:
    rows = [
        {"suite": "loss", "seqlen": seqlen, "attention": name, "step": step, "loss": loss}
        for seqlen, names in (("4096", NAMES[::2]), ("1024", NAMES))
        for name in names
        for step, loss in enumerate((5.5, 4.0 if name == "sdpa_flash" else 3.0))
    ]
    short, long, _, deviations = plot.draw_training(rows).axes
    titles = ["training, seqlen 1024", "training, seqlen 4096"]
    assert [short.get_title(), long.get_title()] == titles
    drawn = [[line.get_label() for line in axes.get_lines()] for axes in (short, long)]
    assert drawn == [["eager", "sdpa_flash", "flash_attn_cuda"], ["sdpa_flash", "flash_attn_cuda"]]
    off = [list(line.get_ydata()) for line in deviations.get_lines()]
    assert off == [[0.0, 0.5], [0.0, -0.5]]

    paths = [tmp_path / "training.csv", tmp_path / "training_losses.csv"]
    described = [{"suite": "training", "seqlen": "1024", "status": "ok"}]
    for path, columns, written in (
        (paths[0], training.COLUMNS, described),
        (paths[1], training.LOSS_COLUMNS, rows),
    ):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(written)
    plot.main([*map(str, paths), "--out", str(tmp_path / "figures")])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["training.png"]
