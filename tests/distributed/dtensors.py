# SPDX-License-Identifier: BSD-3-Clause
"""Attention of DTensors: refused as they are, and computed under local_map; fails where results or
gradients are not those of the whole tensors.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed/dtensors.py

On as many GPUs through NCCL where --device is cuda, else on the CPU through gloo.
"""

from __future__ import annotations

import argparse
import gc
import os
from datetime import timedelta
from pathlib import Path
from sys import path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

path.insert(0, str(Path(__file__).resolve().parents[2]))

from flash_attn_cuda import flash_attn_func

BATCH_OR_HEADS = (0, 2)


def check(mesh: DeviceMesh, dim: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    qkv = [
        torch.randn(2, 70, heads, 16, device=mesh.device_type, dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    expected = flash_attn_func(*qkv, 0.0, None, True, deterministic=True)
    gradients = torch.autograd.grad(expected, qkv, torch.ones_like(expected))

    placement = [Shard(dim)]
    sharded = [distribute_tensor(x.detach(), mesh, placement).requires_grad_() for x in qkv]
    try:
        flash_attn_func(*sharded)
    except NotImplementedError as error:
        if "sharding strategy" not in str(error):
            raise
    else:
        raise AssertionError("DTensors were taken")
    attention = local_map(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True),
        out_placements=placement,
        in_placements=(placement, placement, placement),
    )
    out = attention(*sharded)
    out.backward(distribute_tensor(torch.ones_like(expected), mesh, placement))
    results = [out, *(x.grad for x in sharded)]
    for got, wanted in zip(results, [expected, *gradients], strict=True):
        if tuple(got.placements) != tuple(placement):
            raise AssertionError(f"placed {got.placements}, expected {placement}")
        if not torch.equal(got.full_tensor(), wanted):
            raise AssertionError(f"dimension {dim}: not the values of the whole tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for dim in BATCH_OR_HEADS:
            check(mesh, dim)
        del mesh
        gc.collect()  # tensors hold threads of the process group, which must end before it does
    finally:
        dist.destroy_process_group()
    os._exit(0)  # torch's threads may outlive the interpreter's end, which then aborts


if __name__ == "__main__":
    main()
