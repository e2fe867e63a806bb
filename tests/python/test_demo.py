# SPDX-License-Identifier: BSD-3-Clause
"""The demo runs through, in miniature."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flash_attn_cuda.__main__ import main
from flash_attn_cuda.demo import check, comparison, train
from flash_attn_cuda.demo.gpt import GPT, GPTConfig

TINY = GPTConfig(context=32, layers=1, heads=2, width=32)


@pytest.fixture(autouse=True)
def _short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAMPLE_LENGTH", 3)


def test_demo_prints_every_part_and_plots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "demo.png"
    arguments = ["--device", "cpu", "--lengths", "64", "128", "--steps", "2"]
    assert main([*arguments, "--target-loss", "6", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for part in ("device:", "build:", "kernel:", "dq", "seqlen", "128", "loss 5."):
        assert part in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_when_the_loss_misses_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--lengths", "32", "--steps", "1", "--target-loss", "1"]
    assert main(arguments) == 1
    assert "above the target of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments"), [("matplotlib", ["--plot"]), ("tqdm", ["--lengths", "32"])]
)
def test_demo_names_a_missing_package(
    missing: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--device", "cpu", *arguments]) == 1
    assert f"pip install {missing}" in capsys.readouterr().err


def test_loss_falls(device: str) -> None:
    pytest.importorskip("tqdm")
    config = train.TrainConfig(steps=40, batch=8, warmup=5, learning_rate=1e-2)
    trained = train.train(device, config, TINY)
    assert trained.losses[0] == pytest.approx(5.5, abs=0.2)
    assert trained.final_loss < 4.0
    assert trained.sample.startswith(train.PROMPT.decode())


def test_errors_are_those_of_the_arithmetic(device: str) -> None:
    assert all(error.tolerable for error in check.errors(device))


def test_standard_attention_needs_quadratic_memory_and_flash_does_not(device: str) -> None:
    short, long = comparison.rows(device, (512, 1024))
    assert long.standard.peak_bytes > 3.0 * short.standard.peak_bytes
    assert long.flash.peak_bytes < 2.5 * short.flash.peak_bytes


def test_the_model_is_causal() -> None:
    model = GPT(TINY)
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 0
    torch.testing.assert_close(model(changed)[:, :12], model(tokens)[:, :12], rtol=0, atol=0)
