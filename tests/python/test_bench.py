# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark writes every row it promises, and its report reads them."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--device=cpu", "--commit=abc", "--tokens=64", "--hidden=64", "--head-dims=32"]
COLUMNS = [
    *("suite", "pass", "head_dim", "seqlen", "batch", "heads", "heads_kv", "causal", "dtype"),
    *("provider", "status", "p20_ms", "p50_ms", "p80_ms", "tflops", "peak_mib", "regime"),
    *("gpu", "sm_clock_mhz", "power_w", "torch", "cuda", "version", "commit"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench")
    monkeypatch.setitem(module.REGIMES, "burst", (1, 2))
    monkeypatch.setitem(module.HOST_CALLS, "cpu", (2, 2))
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plot")


def measured(bench: ModuleType, out: Path, *arguments: str) -> list[dict[str, str]]:
    bench.main([*TINY, "--seqlens", "16", "32", "--out", str(out), *arguments])
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def test_dense_has_every_row_and_the_report_its_ratios(
    bench: ModuleType,
    report: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "dense.csv"
    names = ("flash_attn_cuda", "sdpa_flash", "eager")
    rows = measured(bench, out, "--providers", *names, "--eager-max-seqlen", "16")
    keys = {(r["pass"], r["seqlen"], r["causal"], r["provider"]) for r in rows}
    assert len(rows) == len(keys) == 2 * 2 * 2 * 3
    for r in rows:
        assert (r["suite"], r["head_dim"], r["heads"]) == ("dense", "32", "2")
        assert (r["dtype"], r["commit"], r["regime"]) == ("float32", "abc", "burst")
        assert int(r["batch"]) * int(r["seqlen"]) == 64
        if r["provider"] == "eager" and r["seqlen"] == "32":
            assert (r["status"], r["p50_ms"]) == ("left out by --eager-max-seqlen", "")
            continue
        assert r["status"] == "ok"
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        flops = 4.0 * 64 * int(r["seqlen"]) * 64
        flops *= (2.5 if r["pass"] == "bwd" else 1) * (0.5 if r["causal"] == "yes" else 1)
        assert float(r["tflops"]) == pytest.approx(flops / float(r["p50_ms"]) / 1e9, rel=1e-3)
    firsts = {tuple(r["provider"] for r in rows[i : i + 3]) for i in range(0, len(rows), 3)}
    assert len(firsts) == 3  # each provider goes first at times

    report.main([str(out), "--reference", "best"])
    printed = capsys.readouterr().out
    assert printed.count("\n| fwd | 32 | yes |") == printed.count("\n| bwd | 32 | no |") == 2
    assert "geometric mean of ours / best" in printed
    assert "\nWorst: " in printed
    assert "- eager, 4 of the rows: left out by --eager-max-seqlen" in printed


def test_report_computes_ratios_means_and_the_worst_row(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.csv"
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for seqlen, name, tflops in (
            *((512, "flash_attn_cuda", 200), (512, "sdpa_flash", 100), (512, "sdpa_cudnn", 400)),
            *((1024, "flash_attn_cuda", 800), (1024, "sdpa_flash", 100), (1024, "eager", None)),
        ):
            writer.writerow(
                {"suite": "dense", "pass": "fwd", "head_dim": 64, "causal": "yes"}
                | {"seqlen": seqlen, "provider": name, "tflops": tflops}
                | {"status": "ok" if tflops else "out of memory"}
            )
    report.main([str(out)])
    printed = capsys.readouterr().out
    assert "| fwd | 64 | yes | 512 | 200 | - | 400 | 100 | 2.000 |" in printed
    assert "| fwd | 64 | yes | 1024 | 800 | OOM | - | 100 | 8.000 |" in printed
    assert "| fwd | 64 | 2 | 4.000 |" in printed
    assert "Worst: 2.000 at fwd, head_dim 64, causal, 512." in printed
    report.main([str(out), "--reference", "best"])
    assert "| fwd | 64 | yes | 512 | 200 | - | 400 | 100 | 0.500 |" in capsys.readouterr().out


def test_heads_may_share_keys_and_values(bench: ModuleType, tmp_path: Path) -> None:
    names = ("flash_attn_cuda", "deterministic", "sdpa_flash", "eager")
    arguments = ("--heads", "4", "--heads-kv", "2", "--providers", *names)
    rows = measured(bench, tmp_path / "gqa.csv", *arguments)
    assert {(r["heads"], r["heads_kv"]) for r in rows} == {("4", "2")}
    assert {(r["provider"], r["status"]) for r in rows} == {(name, "ok") for name in names}


def test_all_providers_compute_attention(bench: ModuleType) -> None:
    q, k, v, dout = bench.tensors((1, 24, 4, 16), 2, "cpu", "float32")
    assert q.shape == dout.shape == (1, 24, 4, 16)
    assert k.shape == v.shape == (1, 24, 2, 16)
    for causal in (False, True):
        expected = bench.providers.load("eager").attention(q, k, v, causal)
        for name in ("flash_attn_cuda", "deterministic", "sdpa_flash"):
            provider = bench.providers.load(name)
            out = provider.attention(*map(provider.view, (q, k, v)), causal)
            torch.testing.assert_close(provider.view(out), expected)


def test_plots_show_what_the_csv_holds(plot: ModuleType, tmp_path: Path) -> None:
    row = {"suite": "dense", "pass": "fwd", "head_dim": "64", "causal": "yes", "status": "ok"}
    rows = [
        row | {"seqlen": seqlen, "provider": name, "tflops": tflops, "p50_ms": ms}
        for seqlen, name, tflops, ms in (
            *(("1024", "eager", "20", "8"), ("512", "eager", "10", "6")),
            *(("1024", "flash_attn_cuda", "80", "2"), ("512", "flash_attn_cuda", "30", "2")),
            ("2048", "flash_attn_cuda", "90", "7"),
        )
    ]
    assert plot.speeds(rows)["flash_attn_cuda"] == [(1024, 80.0), (512, 30.0), (2048, 90.0)]
    assert plot.speedups(rows) == {"flash_attn_cuda": [(1024, 4.0), (512, 3.0)]}
    (axes,) = plot.draw(rows, plot.speeds, "TFLOP/s", False).axes
    assert axes.get_title() == "forward, causal, head_dim 64"
    ours, standard = axes.get_lines()
    assert list(ours.get_xdata()) == [512, 1024, 2048]
    assert list(standard.get_ydata()) == [10, 20]

    path = tmp_path / "made.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*rows, rows[0] | {"status": "out of memory", "tflops": ""}])
    plot.main([str(path), "--out", str(tmp_path / "figures")])
    drawn = {figure.name for figure in (tmp_path / "figures").iterdir()}
    assert drawn == {"speed.png", "speedup.png"}  # nothing of memory was measured


def test_what_cannot_run_says_why(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "reasons.csv"
    names = ("sdpa_cudnn", "flash_attn_interface", "flash_attn_cuda")
    rows = measured(bench, out, "--suites", "host", "memory", "--providers", *names)
    assert [r["pass"] for r in rows if r["suite"] == "host"][::3] == ["fwd", "fwd_grad", "fwd_bwd"]
    for r in rows:
        if r["provider"] == "flash_attn_cuda" and r["suite"] == "host":
            assert (r["status"], r["seqlen"], r["heads"]) == ("ok", "128", "8")
            assert float(r["p50_ms"]) > 0
        elif r["provider"] == "flash_attn_cuda":
            assert r["status"].endswith("peak memory is counted on CUDA only")
        elif r["provider"] == "sdpa_cudnn":
            assert r["status"].startswith("cannot run: ")
        else:
            assert "No module named" in r["status"]


def test_running_out_of_memory_is_a_status(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "device_times", fail)
    rows = measured(bench, tmp_path / "oom.csv", "--providers", "eager")
    assert {r["status"] for r in rows} == {"out of memory"}
