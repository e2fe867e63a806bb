# SPDX-License-Identifier: BSD-3-Clause
"""Prints the README's support table from the kernel table: `python .ci/support_table.py`."""

from __future__ import annotations

import flash_attn_cuda

DEVICES = {
    "cpu": "every x86-64 and aarch64",
    "sm80": "NVIDIA GPUs from Ampere on (compute capability 8.0 and newer)",
}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def support_table() -> str:
    kernels = flash_attn_cuda.build_info()["kernels"]
    lines = [
        "| family | runs on | pass | dtypes | head_dim | causal, windows, GQA/MQA, any lengths |",
        "|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(row["family"] for row in kernels):
        for pass_name, title in (("fwd", "forward"), ("bwd", "backward")):
            rows = [r for r in kernels if r["family"] == family and r["pass"] == pass_name]
            dtypes = ", ".join(dict.fromkeys(SHORT[row["dtype"]] for row in rows))
            largest = max(row["head_dim"] for row in rows)
            windowed = {row["dtype"] for row in rows if row["mask"] == "window"}
            masks = "yes" if windowed == {row["dtype"] for row in rows} else "in part"
            lines.append(
                f"| {family} | {DEVICES[family]} | {title} | {dtypes} | 1 to {largest} | {masks} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
