# SPDX-License-Identifier: BSD-3-Clause
"""Prints the tables of what runs, from the kernel table and from what the tests draw:
`python -m tests.support.readme_tables`. The first part is the README's, the second that of
benchmarks/README.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import flash_attn_cuda
from tests import fuzz
from tests.kernels import test_fuzz
from tests.support.features import FEATURES, Feature, pairs_in_none

Row = dict[str, Any]

DEVICES = {
    "sm90": "NVIDIA Hopper (9.0)",
    "sm80": "NVIDIA GPUs from Ampere on: machine code for 8.x and 9.0, PTX for newer ones",
    "cpu": "every x86-64 and aarch64",
}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
SHORT["tf32"] = SHORT["float32"]  # of the same tensors
PASSES = {"fwd": "forward", "bwd": "backward"}
# Shared memory of a block, in KiB, and the compute capabilities that have it.
MEMORY = {99: "8.6, 8.9, 12.0", 163: "8.0, 8.7", 227: "10.0"}
# GPUs that choose differently: their shared memory, and the families that they run.
GPUS = {
    **{f"{kib} KiB": (kib, {"sm80"}) for kib in MEMORY},
    "Hopper": (227, {"sm80", "sm90"}),
}


def join(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def table(header: list[str], body: list[list[str]]) -> str:
    rule = "|" + "---|" * len(header)
    header_line, *lines = (f"| {' | '.join(cells)} |" for cells in [header, *body])
    return "\n".join([header_line, rule, *lines])


def largest_of(rows: list[Row]) -> str:
    """The largest head_dim of such rows, and of dtypes that have a smaller one."""
    of_dtype: dict[str, int] = {}
    for row in rows:
        dtype = SHORT[row["dtype"]]
        of_dtype[dtype] = max(of_dtype.get(dtype, 0), row["head_dim"])
    most = max(of_dtype.values(), default=0)
    others = join(f"{dtype} {n}" for dtype, n in of_dtype.items() if n != most)
    return f"{most} ({others})" if others else str(most or "-")


def what_runs(rows: list[Row]) -> tuple[str, str]:
    """The dtypes and head dimensions of a family's rows of one pass."""
    return join(SHORT[row["dtype"]] for row in rows), f"1 to {largest_of(rows)}"


def families(kernels: list[Row]) -> str:
    body = []
    for family in DEVICES:
        passes: dict[tuple[str, str], list[str]] = {}
        for pass_name, title in PASSES.items():
            rows = [r for r in kernels if r["family"] == family and r["pass"] == pass_name]
            if rows:
                passes.setdefault(what_runs(rows), []).append(title)
        body += [[family, DEVICES[family], join(names), *what] for what, names in passes.items()]
    return table(["family", "runs on", "pass", "dtypes", "head_dim"], body)


def features(kernels: list[Row]) -> str:
    """Those that the same rows run share a line."""

    def largest(feature: Feature, family: str, pass_name: str) -> str:
        """The head_dim up to which a pass of a family does it."""
        rows = [row for row in kernels if (row["family"], row["pass"]) == (family, pass_name)]
        return largest_of(list(filter(feature.runs, rows)))

    columns = [(family, pass_name) for family in DEVICES for pass_name in PASSES]
    lines: dict[tuple[str, ...], list[str]] = {}
    for feature in FEATURES:
        cells = tuple(largest(feature, *column) for column in columns)
        lines.setdefault(cells, []).append(f"{feature.name} ({feature.asked_for_by})")
    return table(
        ["feature", *(f"{family} {PASSES[pass_name]}" for family, pass_name in columns)],
        [["; ".join(names), *cells] for cells, names in lines.items()],
    )


def runs_on(device: str, feature: Feature) -> bool:
    kernels = flash_attn_cuda.build_info()["kernels"]
    return any(
        feature.runs(row) for row in kernels if (row["family"] == "cpu") == (device == "cpu")
    )


def pairs() -> str:
    """Which features meet in the problems that every device is tested with."""
    count = min(test_fuzz.CASES.values())
    missing = join(
        f"{one.name} with {other.name}"
        for device in test_fuzz.CASES
        for one, other in pairs_in_none(itertools.islice(fuzz.cases(device, seed=0), count))
        if runs_on(device, one) and runs_on(device, other)
    )
    where = "random\nproblems of the tests (`tests/fuzz.py`)"
    return f"Each two of them meet in {where}{missing and f', but {missing}'}."


def fits(row: Row, kib: int) -> bool:
    """As KernelConfig::fits: each block takes 1 KiB more, and a multiprocessor has 1 KiB more."""
    return bool(row["blocks"] * (row["smem_bytes"] + 1024) <= (kib + 1) * 1024)


def first_row(kernels: list[Row], pass_name: str, dtype: str, head_dim: int, gpu: str) -> Row:
    kib, families = GPUS[gpu]
    return next(
        row
        for row in kernels
        if (row["pass"], row["dtype"]) == (pass_name, dtype)
        and row["family"] in families
        and row["head_dim"] >= head_dim
        and row["mask"] == "window"
        and fits(row, kib)
    )


def tiles(kernels: list[Row]) -> str:
    def cell(pass_name: str, head_dim: int, gpu: str) -> str:
        rows = (first_row(kernels, pass_name, t, head_dim, gpu) for t in ("bfloat16", "float16"))
        return join(f"{row['tile_m']}x{row['tile_n']}" for row in rows)

    head_dims = sorted({row["head_dim"] for row in kernels if row["family"] == "sm80"})
    columns = [(pass_name, gpu) for pass_name in PASSES for gpu in GPUS]
    return table(
        ["head_dim up to", *(f"{PASSES[pass_name]}, {gpu}" for pass_name, gpu in columns)],
        [[str(n), *(cell(pass_name, n, gpu) for pass_name, gpu in columns)] for n in head_dims],
    )


def of_features() -> str:
    kernels = flash_attn_cuda.build_info()["kernels"]
    return f"""\
{families(kernels)}

By feature, the largest head_dim that runs it. On Hopper sm80 runs what sm90 does not. {pairs()}

{features(kernels)}"""


def of_tiles() -> str:
    memory = "; ".join(f"{kib} KiB on {names}" for kib, names in MEMORY.items())
    return f"""\
On CUDA, 16-bit without bias and mask, in tiles (queries x keys) by the shared memory of a block:
{memory}; and on Hopper (9.0, 227 KiB), which prefers sm90.

{tiles(flash_attn_cuda.build_info()["kernels"])}"""


if __name__ == "__main__":
    print(of_features(), of_tiles(), sep="\n\n")
