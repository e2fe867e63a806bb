# SPDX-License-Identifier: BSD-3-Clause
"""Traffic is what ncu counted, call by call, and the models of it are the paper's."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METRICS = [
    *("dram__bytes_read.sum", "dram__bytes_write.sum", "l1tex__m_l1tex2xbar_write_bytes.sum"),
    *("l1tex__m_xbar2l1tex_read_bytes.sum", "lts__t_sectors.sum"),
]
SWEEP_BYTES = "268,435,456"
# The raw page of ncu --csv --print-units base, with fewer columns: one of ours, then standard.
LISTED = [
    ("fwd_kernel", "1,000", "10", "40", "5,000", "300"),
    ("reduce_kernel", SWEEP_BYTES, "30", "8", "7", "6"),
    ("splitKreduce_kernel", "2000", "100", "50", "60", "70"),
    ("cunn_SoftMaxForward", "3000", "200", "500", "600", "700.00"),
    ("void at::native::reduce_kernel<512, 1, int>(T3)", SWEEP_BYTES, "7", "8", "7", "6"),
]


def table(metrics: list[str]) -> str:
    units = ["sector" if "sectors" in metric else "byte" for metric in metrics]
    lines = [["ID", "Process ID", "Kernel Name", *metrics], ["", "", "", *units]]
    for number, (name, *values) in enumerate(LISTED):
        of = dict(zip(METRICS, values, strict=True))
        lines.append([str(number), "77", name, *(of.get(metric, "n/a") for metric in metrics)])
    messages = [f'==PROF== Profiling "{name}" - 0: 0%....100% - 1 pass' for name, *_ in LISTED]
    rows = [",".join(f'"{cell}"' for cell in line) for line in lines]
    return "\n".join(["==PROF== Connected to process 77", *messages, *rows, "==PROF== Bye", ""])


POINTS = [
    {"provider": "flash_attn_cuda", "status": "ok", "seqlen": 512},
    {"provider": "sdpa_cudnn", "status": "out of memory", "seqlen": 512},
    {"provider": "eager", "status": "ok", "seqlen": 512},
]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("traffic")


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plot")


def record(raw: Path, log: str) -> list[str]:
    raw.mkdir(exist_ok=True)
    (raw / "points.json").write_text(json.dumps(POINTS))
    (raw / "ncu.log").write_text(log)
    return ["--reread", "--raw", str(raw)]


def test_counters_are_added_up_by_call(
    traffic: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "traffic.csv"
    traffic.main([*record(tmp_path, table(METRICS)), "--out", str(out)])
    with out.open(newline="") as file:
        ours, cudnn, standard = csv.DictReader(file)
    assert ours["kernels"] == "fwd_kernel"
    assert standard["kernels"] == "splitKreduce_kernel + cunn_SoftMaxForward"
    assert (ours["dram_read_bytes"], ours["sm_read_bytes"]) == ("1000", "5000")
    assert (ours["dram_write_bytes"], ours["sm_write_bytes"]) == ("40", "40")  # 30 by the sweep
    assert (standard["dram_read_bytes"], standard["dram_write_bytes"]) == ("5000", "307")
    assert (standard["l2_bytes"], standard["sweep_read_bytes"]) == (f"{32 * 770}", f"{2**28}")
    assert (cudnn["status"], cudnn["dram_read_bytes"]) == ("out of memory", "")
    assert capsys.readouterr().err == "1 rows are not ok: see their status\n"


@pytest.mark.parametrize("listed", [METRICS[:-1], [*METRICS[:-1], "lts__t_sectors.max"]])
def test_a_metric_that_is_missing_is_named(
    traffic: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    listed: list[str],
) -> None:
    traffic.main(record(tmp_path, table(listed)))
    printed = capsys.readouterr()
    assert "ncu did not count lts__t_sectors.sum: l2_bytes has gaps" in printed.err
    assert ",1000,40,5000,40,,268435456,fwd_kernel," in printed.out


def test_several_passes_are_told(
    traffic: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic.main(record(tmp_path, table(METRICS).replace("1 pass\n", "3 passes\n", 1)))
    assert "ncu took several passes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "log",
    [
        "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM: no permission\n",
        table(METRICS).replace('"reduce_kernel"', '"another"') + "==ERROR== ERR_NVGPUCTRPERM\n",
    ],
    ids=["no table", "a sweep is missing"],
)
def test_calls_that_are_not_listed_end_with_the_words_of_ncu(
    traffic: ModuleType, tmp_path: Path, log: str
) -> None:
    with pytest.raises(SystemExit, match=r"2 calls ran, and ncu lists [01]; .*ncu\.log") as stopped:
        traffic.main(record(tmp_path, log))
    assert "==ERROR== ERR_NVGPUCTRPERM" in str(stopped.value)


def test_it_needs_ncu_and_a_gpu(
    traffic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="ncu is not on PATH"):
        traffic.main(["--raw", str(tmp_path)])
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\nexit 3\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        traffic.main(["--raw", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="ncu ended with status 3"):
        traffic.main(["--raw", str(tmp_path)])


def test_ncu_gets_every_metric_and_runs_the_same_points(
    traffic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" >{said}\nexit 3\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = ["--raw", str(tmp_path), "--seqlens", "512", "1024"]
    with pytest.raises(SystemExit):
        traffic.main(arguments)
    options, worker = said.read_text().split(f" {sys.executable} ")
    assert set(options.split("--metrics ")[1].split()[0].split(",")) == set(METRICS)
    assert "--cache-control none" in options
    assert worker.strip() == " ".join([traffic.__file__, *arguments, "--worker"])
    points = list(traffic.cases(traffic.parse(arguments)))
    assert len(points) == len(set(points)) == 2 * 2 * 4


def test_models_are_those_of_the_paper(traffic: ModuleType) -> None:
    n, d, heads, element, memory = 1000, 64, 3, 2, 128 * 1024
    case = traffic.bench.Case("io", "fwd", d, n, 1, heads, heads, False)
    model = traffic.theory(case, element, memory, 128)
    lse = 4 * heads * n
    assert model["compulsory_bytes"] == heads * 4 * n * d * element + lse
    assert model["standard_bytes"] == heads * (4 * n * d + 4 * n * n) * element
    elements_on_chip = memory / element
    assert model["theorem_bytes"] == heads * n * n * d * d / elements_on_chip * element
    assert model["tile_bytes"] == heads * (2 * n * d * 8 + 2 * n * d) * element + lse
    assert "tile_bytes" not in traffic.theory(case, element, memory, None)
    q = torch.zeros(1, 8, 2, 64)
    assert traffic.query_tile(q, q, q) == 64


def test_figures_hold_providers_and_models(
    traffic: ModuleType, plot: ModuleType, tmp_path: Path
) -> None:
    rows = []
    for seqlen in ("1024", "512"):
        shared = {"suite": "io", "pass": "fwd", "head_dim": "64", "causal": "no", "status": "ok"}
        shared |= {"seqlen": seqlen, "compulsory_bytes": 2**20, "standard_bytes": 2**23}
        shared |= {"theorem_bytes": 2**21, "dram_read_bytes": 2**21, "dram_write_bytes": 2**20}
        rows += [
            shared | {"provider": "eager"},
            shared | {"provider": "flash_attn_cuda", "tile_bytes": 2**22}
            | {"sm_read_bytes": 2**22, "sm_write_bytes": 2**22},
        ]  # fmt: skip
    path = tmp_path / "traffic.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, traffic.COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    read = plot.read([path])
    assert plot.dram(read)["eager"] == [(1024, 3.0), (512, 3.0)]
    assert plot.dram(read)["4 N d"] == [(512, 1.0), (1024, 1.0)]
    assert plot.on_chip(read)["flash_attn_cuda"] == [(1024, 8.0), (512, 8.0)]
    assert plot.on_chip(read)["tiles of flash_attn_cuda"] == [(512, 4.0), (1024, 4.0)]
    assert "eager" not in plot.on_chip(read)  # ncu did not count it
    plot.main([str(path), "--out", str(tmp_path / "figures")])
    drawn = {figure.name for figure in (tmp_path / "figures").iterdir()}
    assert drawn == {"dram.png", "l2.png"}
