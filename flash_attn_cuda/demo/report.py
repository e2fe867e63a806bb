# SPDX-License-Identifier: BSD-3-Clause
"""Which device, which build, and which kernel each pass runs."""

from __future__ import annotations

import platform

import torch

from flash_attn_cuda import build_info, explain


def inputs(
    device: str, shape: tuple[int, int, int, int], heads_kv: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v of (batch, seqlen, heads, head_dim) in the dtype that the demo uses there:
    bfloat16 on a GPU, float32 on the CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, seqlen, heads, head_dim = shape
    kv_shape = (batch, seqlen, heads_kv or heads, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size, generator=generator).to(device, dtype).requires_grad_()
        for size in (shape, kv_shape, kv_shape)
    )
    return q, k, v


def report(device: str) -> str:
    """A few lines for the top of the demo."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        hardware = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    else:
        hardware = f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"
    build = ", ".join(
        f"{name} {_readable(value)}" for name, value in build_info().items() if name != "kernels"
    )
    chosen = explain(*inputs(device, (1, 128, 4, 64)), causal=True)
    return f"device: {hardware}\nbuild:  {build}, torch {torch.__version__}\nkernel: {chosen}"


def _readable(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)
