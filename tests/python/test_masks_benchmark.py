# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of masks gives all providers one problem, and counts the pairs that are seen."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_cuda.reference import visible_pairs, window_mask

pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--device=cpu", "--commit=abc", "--budget-ms=1", "--seqlen=40", "--heads=2", "--head-dim=8"]
COLUMNS = [
    *("suite", "work", "provider", "pass", "batch", "seqlen", "heads", "head_dim", "pairs"),
    *("dtype", "status", "p20_ms", "p50_ms", "p80_ms", "tflops", "budget_ms"),
    *("gpu", "driver", "sm_clock_mhz", "power_w", "torch", "cuda", "version", "commit"),
    "timestamp",
]
BLOCKS = ("blocks_100", "blocks_50", "blocks_25", "blocks_12.5")
TERMS = {"dropout": "dropout_p", "softcap": "softcap", "alibi": "alibi_slopes"}
DENSE = ("bias", "mask", "window", "documents", "padding", *TERMS, *BLOCKS)
ALL_PAIRS = ("bias", "mask", "blocks_100")
GPU_ONLY = ("sdpa_cudnn", "sdpa_efficient", "torch_varlen")


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("masks")


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("works")
    monkeypatch.setattr(module, "compiled_flex", lambda: flex_attention)
    return module


def flex_attention(*qkv: Tensor, **arguments: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention as uncompiled

    return uncompiled(*qkv, **arguments)


def measured(masks: ModuleType, out: Path, *arguments: str) -> list[dict[str, str]]:
    masks.main([*TINY, "--out", str(out), *arguments])
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def test_has_every_row_and_a_table_of_ratios(
    masks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured(masks, tmp_path / "masks.csv")
    found = [(r["work"], r["pass"], r["provider"]) for r in rows]
    peers = {"varlen": (), "documents": ("flash_attn_cuda.varlen", "sdpa_math")}
    peers |= dict.fromkeys(BLOCKS, ("flash_attn_cuda.plain", "sdpa_math"))
    peers |= {"softcap": (), "alibi": ()}
    assert len(found) == len(set(found))
    assert set(found) == {
        (work, pass_name, provider)
        for work in ("varlen", *DENSE)
        for pass_name in ("fwd", "bwd", *(("bwd_bias",) if work == "bias" else ()))
        for provider in ("flash_attn_cuda", *peers.get(work, ("sdpa_math",)))
    }
    printed = capsys.readouterr().out
    own = {(r["work"], r["pass"]): r for r in rows if r["provider"] == "flash_attn_cuda"}
    for r in rows:
        assert (r["suite"], r["status"], r["dtype"]) == ("masks", "ok", "float32")
        assert (r["heads"], r["head_dim"], r["commit"], r["driver"]) == ("2", "8", "abc", "")
        assert 0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"])
        flops = 4 * 8 * int(r["pairs"]) * (1 if r["pass"] == "fwd" else 2.5)
        assert float(r["tflops"]) == pytest.approx(flops / float(r["p50_ms"]) / 1e9, rel=1e-3)
        ours = own[r["work"], r["pass"]]
        ratio = "-" if r is ours else f"{float(r['p50_ms']) / float(ours['p50_ms']):.3f}"
        cells = (r["work"], r["pass"], r["provider"], r["p50_ms"], r["tflops"], ratio)
        assert f"| {' | '.join(cells)} |" in printed.splitlines()
    firsts = {r["pass"]: r["provider"] for r in reversed(rows) if r["work"] == "bias"}
    assert firsts["fwd"] != firsts["bwd"]  # each provider goes first at times


def seen_by(works: ModuleType, monkeypatch: pytest.MonkeyPatch, work: Any) -> int:
    """How many pairs are visible under what flash_attn_func gets."""
    counts = []

    def count(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, **rules: Any) -> Tensor:
        batch, seqlen, heads, _ = q.shape
        rules = {name: rule for name, rule in rules.items() if name not in TERMS.values()}
        visible = visible_pairs(seqlen, seqlen, **rules).expand(batch, heads, -1, -1)
        counts.append(int(visible.sum()))
        return q

    monkeypatch.setattr(works, "flash_attn_func", count)
    work.providers["flash_attn_cuda"].attention(*[torch.empty(work.shape)] * 3, work.causal)
    return counts.pop()


@pytest.mark.parametrize("name", DENSE)
def test_counts_the_pairs_that_are_seen(
    works: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    work = works.MAKERS[name](works.Problem(3, 300, 2, 8, "cpu", "float32"))
    seen = seen_by(works, monkeypatch, work)
    all_pairs = 3 * 2 * 300**2
    if name in ALL_PAIRS:
        assert work.pairs == all_pairs
        assert seen == all_pairs if name != "mask" else 0.4 < seen / all_pairs < 0.6
    else:
        assert work.pairs == seen < all_pairs


@pytest.mark.parametrize("percent", [100, 50, 25, 12.5])
def test_block_masks_are_as_dense_as_they_say(works: ModuleType, percent: float) -> None:
    work = works.MAKERS[f"blocks_{percent:g}"](works.Problem(1, 8192, 4, 8, "cpu", "float32"))
    assert work.pairs / (4 * 8192**2) == pytest.approx(percent / 100, rel=0.05)


def test_packed_sequences_are_those_of_the_targets(
    works: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def read(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
        assert causal
        assert torch.equal(cu_q, cu_k)
        lengths.extend(cu_q.diff().tolist())
        return q

    monkeypatch.setattr(works, "flash_attn_varlen_func", read)
    work = works.varlen(works.Problem(2, 8192, 16, 8, "cpu", "float32"))
    work.providers["flash_attn_cuda"].attention(*[torch.empty(work.shape)] * 3, work.causal)
    assert work.shape == (1, 37300, 16, 8)
    assert len(lengths) == 16
    assert sum(lengths) == 37300
    assert work.pairs == 16 * sum(int(window_mask(n, n, causal=True).sum()) for n in lengths)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name in DENSE if name != "dropout"])
def test_all_providers_compute_the_same(
    works: ModuleType, masks: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    problem = works.Problem(2, 300, 2, 16, "cpu", "float32")
    work = works.MAKERS[name](problem)
    assert set(works.PROVIDERS_OF[name]) <= set(work.providers)
    made = masks.bench.tensors(work.shape, 2, "cpu", "float32")[:3]

    def out_of(provider: str) -> Tensor:
        computed = work.providers[provider]
        with computed.context():
            return computed.view(computed.attention(*map(computed.view, made), work.causal))

    expected = out_of("flash_attn_cuda")
    for provider in works.PROVIDERS_OF[name]:
        if provider == "flash_attn_cuda.plain":
            plain = torch.allclose(out_of(provider), expected, atol=1e-5)
            assert plain == (name == "blocks_100")
        elif provider not in GPU_ONLY:
            torch.testing.assert_close(out_of(provider), expected)


def test_only_bwd_bias_computes_the_gradient_of_the_bias(
    masks: ModuleType, works: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gradient = []

    def time_once(run: Callable[[], object], drop: Callable[[], None], *_: object) -> Any:
        drop()
        run()
        with_gradient.append(bias().grad is not None)
        return [1.0], None

    def bias() -> Tensor:
        work = masks.load("bias", works.Problem(2, 40, 2, 8, "cpu", "float32"))
        return work.bias  # type: ignore[no-any-return]

    monkeypatch.setattr(masks.bench, "device_times", time_once)
    rows = measured(masks, tmp_path / "bias.csv", "--works", "bias")
    assert with_gradient == [r["pass"] == "bwd_bias" for r in rows]
    assert bias().grad is None  # dropped after the last row


def test_what_cannot_run_says_why(
    masks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--works", "varlen", "padding", "--passes", "fwd", "--providers")
    rows = measured(
        masks, tmp_path / "no.csv", *arguments, "flash_attn_cuda", "torch_varlen", "sdpa_efficient"
    )
    printed = capsys.readouterr().out
    assert [r["work"] for r in rows] == ["varlen", "varlen", "padding", "padding"]
    for r in rows:
        if r["provider"] == "flash_attn_cuda":
            assert r["status"] == "ok"
        else:
            assert r["status"].startswith("cannot run: ")
            assert r["pairs"] != "" == r["p50_ms"]
            assert f"| {r['provider']} | {r['status']} | - | - |" in printed


def test_running_out_of_memory_is_a_status_and_the_rest_goes_on(
    masks: ModuleType, works: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(works.MAKERS, "mask", full)
    rows = measured(masks, tmp_path / "oom.csv", "--works", "mask", "window", "--passes", "fwd")
    assert [(r["work"], r["status"]) for r in rows] == [
        *[("mask", "out of memory")] * 2,
        *[("window", "ok")] * 2,
    ]
