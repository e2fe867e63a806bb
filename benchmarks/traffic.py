# SPDX-License-Identifier: BSD-3-Clause
"""Counts the bytes that one forward call moves, beside what theory says, and writes CSV.

python benchmarks/traffic.py --out traffic.csv && python benchmarks/plot.py traffic.csv
python benchmarks/traffic.py --providers flash_attn_cuda eager --head-dims 64 --seqlens 1024 2048

It needs an NVIDIA GPU whose hardware counters Nsight Compute (ncu) may read. Counted, in bytes:

dram_read, dram_write  between DRAM and the L2 cache
sm_read, sm_write      between L2 and the multiprocessors, whichever instruction asked
l2                     all that L2 looked up: the former, and what its two halves send each other
sweep_read             a check of the counters: DRAM reads of a kernel known to read 256 MiB

Theory (Dao et al., 2022, Theorem 2), in elements per head, times heads and bytes of an element:

compulsory  4 N d: q, k and v read once, out written once; and the float32 LSE
standard    4 N d + 4 N^2 (Algorithm 0): scores and probabilities each written once and read once.
            The provider eager scales the scores in a kernel of its own, which adds 2 N^2
theorem     N^2 d^2 / M, which is an order: it has no factor. M is what on_chip_bytes holds, the
            most shared memory of a block. It describes traffic into the multiprocessors: where keys
            and values fit in L2, DRAM sees little more than the compulsory bytes
tile        2 N d ceil(N / tile_m) + 2 N d: what flash_attn_cuda's kernel asks of L2, for it passes
            over all keys and values once per tile of queries; and the LSE. Of the theorem's order,
            for tile_m is as large as M / d allows

Each call is counted once, kernel by kernel, after one that warms up. Before it a sweep reads more
than L2 holds, so that its inputs come from DRAM. To zero a buffer would do that too, but leave
dirty lines in L2, whose write-back would count as the call's. A second sweep follows the call: what
it makes L2 write back is what the call left there, and is added to dram_write. ncu flushes nothing
itself (--cache-control none), for that would take from standard attention what L2 keeps between its
kernels. The sweeps also tell the calls apart in ncu's list of kernels.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import bench
import providers
import torch
from timing import L2_FLUSH_BYTES, Run
from torch import Tensor
from tqdm import tqdm

from flash_attn_cuda import build_info, explain

# column: metric, and the bytes of one. All of them fit one pass of a kernel: with more, ncu repeats
# it, and what it saves and restores meanwhile disturbs L2.
COUNTED = {
    "dram_read_bytes": ("dram__bytes_read.sum", 1),
    "dram_write_bytes": ("dram__bytes_write.sum", 1),
    "sm_read_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1),
    "sm_write_bytes": ("l1tex__m_l1tex2xbar_write_bytes.sum", 1),
    "l2_bytes": ("lts__t_sectors.sum", 32),
}
COLUMNS = (
    *("suite", "pass", "head_dim", "seqlen", "batch", "heads", "causal", "dtype"),
    *("provider", "status", *COUNTED, "sweep_read_bytes", "kernels"),
    *("compulsory_bytes", "standard_bytes", "theorem_bytes", "tile_bytes"),
    *("tile_m", "on_chip_bytes", "gpu", "torch", "cuda", "version", "commit"),
)
SWEEP = re.compile(r"\breduce_kernel\b")  # torch's sum; cuBLAS has a splitKreduce_kernel
LOG, POINTS = "ncu.log", "points.json"

Kernel = dict[str, str]  # a row of ncu's table


# --- the process that ncu watches ---


def cases(options: argparse.Namespace) -> Iterator[bench.Case]:
    for head_dim, seqlen, provider in itertools.product(
        options.head_dims, options.seqlens, options.providers
    ):
        heads = options.heads
        yield bench.Case(
            "io", "fwd", head_dim, seqlen, options.batch, heads, heads, False, provider
        )


def work(options: argparse.Namespace) -> None:
    """Runs every call, and writes all of the CSV that needs no counter."""
    gpu = torch.cuda.get_device_properties()
    on_chip_bytes = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    constants = bench.environment(options)
    swept = torch.zeros(L2_FLUSH_BYTES // 4, device="cuda")
    points = []
    for case in tqdm(list(cases(options)), unit="call"):
        points.append(point(case, options, swept, on_chip_bytes) | constants)
        torch.cuda.empty_cache()  # standard attention can leave no room for loading a kernel
    (options.raw / POINTS).write_text(json.dumps(points))


def point(
    case: bench.Case, options: argparse.Namespace, swept: Tensor, on_chip_bytes: int
) -> dict[str, object]:
    described: dict[str, object] = {
        "suite": case.suite,
        "pass": case.pass_name,
        "head_dim": case.head_dim,
        "seqlen": case.seqlen,
        "batch": case.batch,
        "heads": case.heads,
        "causal": "no",
        "dtype": options.dtype,
        "provider": case.provider,
    }
    with warnings.catch_warnings(record=True) as told:  # SDPA says there why a backend cannot run
        warnings.simplefilter("always")
        try:
            shape = (case.batch, case.seqlen, case.heads, case.head_dim)
            provider = providers.load(case.provider)
            made = bench.tensors(shape, case.heads_kv, "cuda", options.dtype)
            q, k, v = map(provider.view, made[:3])

            def run() -> None:
                with torch.no_grad(), provider.context():
                    provider.attention(q, k, v, False)

            run()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return described | {"status": "out of memory"}
        except Exception as error:
            return described | {"status": bench.reason(error, [str(x.message) for x in told])}
    count(run, swept)
    tile_m = query_tile(q, k, v) if case.provider == "flash_attn_cuda" else None
    return described | {"status": "ok"} | theory(case, q.element_size(), on_chip_bytes, tile_m)


def count(run: Run, swept: Tensor) -> None:
    swept.sum()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        run()
        swept.sum()
        torch.cuda.synchronize()


def query_tile(q: Tensor, k: Tensor, v: Tensor) -> int:
    tiles = {row["name"]: int(row["tile_m"]) for row in build_info()["kernels"]}
    return tiles[explain(q, k, v).forward.kernel]


def theory(
    case: bench.Case, element_bytes: int, on_chip_bytes: int, tile_m: int | None
) -> dict[str, object]:
    """The models of the docstring. A tensor is q, k, v or out; a matrix the scores of all heads."""
    rows = case.batch * case.heads * case.seqlen
    tensor, matrix = rows * case.head_dim * element_bytes, rows * case.seqlen * element_bytes
    lse = 4 * rows
    models: dict[str, object] = {
        "compulsory_bytes": 4 * tensor + lse,
        "standard_bytes": 4 * tensor + 4 * matrix,
        "theorem_bytes": round(matrix * case.head_dim**2 * element_bytes / on_chip_bytes),
        "on_chip_bytes": on_chip_bytes,
    }
    if tile_m is not None:
        tiles = -(-case.seqlen // tile_m)
        models |= {"tile_m": tile_m, "tile_bytes": 2 * tensor * tiles + 2 * tensor + lse}
    return models


# --- what ncu says ---


def kernels(log: str) -> list[Kernel]:
    """The rows of ncu's table. Messages may surround it, and its first row holds the units."""
    lines = log.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if line.startswith(('"ID"', "ID,"))), len(lines)
    )
    return [row for row in csv.DictReader(lines[start:]) if row["ID"].isdigit()]


def calls(listed: list[Kernel]) -> list[list[Kernel]]:
    """The kernels of each call; the last is the sweep that ended it."""
    found: list[list[Kernel]] = [[]]
    for kernel in listed:
        found[-1].append(kernel)
        if SWEEP.search(kernel["Kernel Name"]):
            found.append([])
    return found if found[-1] else found[:-1]


def total(call: list[Kernel], metric: str) -> float | None:
    """None where ncu did not count it: the column is missing, or holds n/a."""
    try:
        return sum(float(kernel[metric].replace(",", "")) for kernel in call)
    except (KeyError, ValueError):
        return None


def counts(call: list[Kernel]) -> dict[str, object]:
    *own, sweep = call
    found: dict[str, float | None] = {}
    for column, (metric, size) in COUNTED.items():
        counted = total(call if column == "dram_write_bytes" else own, metric)
        found[column] = None if counted is None else size * counted
    found["sweep_read_bytes"] = total([sweep], COUNTED["dram_read_bytes"][0])
    names = " + ".join(kernel["Kernel Name"] for kernel in own)
    cells = {column: "" if x is None else f"{x:.0f}" for column, x in found.items()}
    return {**cells, "kernels": names}


def read(raw: Path) -> list[dict[str, object]]:
    """The rows of the CSV from what a measurement left in a folder."""
    points: list[dict[str, object]] = json.loads((raw / POINTS).read_text())
    log = (raw / LOG).read_text()
    found = calls(kernels(log))
    measured = [point for point in points if point["status"] == "ok"]
    if len(found) != len(measured) or any(len(call) < 2 for call in found):
        stop(f"{len(measured)} calls ran, and ncu lists {len(found)}", raw)
    for point, call in zip(measured, found, strict=True):
        point |= counts(call)
    for column, (metric, _) in COUNTED.items():
        if any(point[column] == "" for point in measured):
            print(f"ncu did not count {metric}: {column} has gaps", file=sys.stderr)
    if max(map(int, re.findall(r"- (\d+) pass", log)), default=1) > 1:
        print("ncu took several passes, which disturb L2: count fewer metrics", file=sys.stderr)
    return points


def stop(sentence: str, raw: Path) -> None:
    log = (raw / LOG).read_text() if (raw / LOG).exists() else ""
    errors = [line for line in log.splitlines() if line.startswith("==ERROR==")]
    sys.exit("\n".join([f"{sentence}; ncu's output is in {raw / LOG}", *errors]))


# --- the process that starts ncu ---


def measure(options: argparse.Namespace, arguments: list[str]) -> None:
    ncu = shutil.which("ncu")
    if ncu is None:
        sys.exit("ncu is not on PATH: it is Nsight Compute's, and comes with the CUDA toolkit")
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU: there are no counters to read")
    options.raw.mkdir(parents=True, exist_ok=True)
    for name in (LOG, POINTS):
        (options.raw / name).unlink(missing_ok=True)
    metrics = ",".join(metric for metric, _ in COUNTED.values())
    command = [ncu, "--profile-from-start", "off", "--metrics", metrics]
    command += ["--clock-control", "none", "--cache-control", "none"]
    command += ["--csv", "--page", "raw", "--print-units", "base"]
    command += ["--print-kernel-base", "function"]
    command += ["--log-file", str(options.raw / LOG)]
    command += [sys.executable, __file__, *arguments, "--worker"]
    status = subprocess.run(command, check=False).returncode
    if status != 0 or not (options.raw / POINTS).exists():
        stop(f"ncu ended with status {status}", options.raw)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(device="cuda")
    add = parser.add_argument
    names = ["flash_attn_cuda", "eager", "sdpa_flash", "sdpa_cudnn"]
    add("--providers", nargs="+", choices=providers.NAMES, default=names, help=" ".join(names))
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--head-dims", type=int, nargs="+", default=[64, 128], help="default: 64 128")
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    add("--seqlens", type=int, nargs="+", default=lengths, help="default: 512 to 16384")
    add("--batch", type=int, default=1, help="default: 1")
    add("--heads", type=int, default=16, help="default: 16")
    add("--out", type=Path, help="default: standard output")
    add("--commit", help="what to write as commit; default: what git says")
    raw = Path(tempfile.gettempdir()) / "flash_attn_cuda_traffic"
    add("--raw", type=Path, default=raw, help=f"folder of ncu's own output; default: {raw}")
    add("--reread", action="store_true", help="measure nothing: read what --raw holds")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    if not options.reread:
        measure(options, arguments)
    rows = read(options.raw)
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("w", newline="")) if options.out else sys.stdout
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    failed = sum(row["status"] != "ok" for row in rows)
    if failed:
        print(f"{failed} rows are not ok: see their status", file=sys.stderr)


if __name__ == "__main__":
    main()
