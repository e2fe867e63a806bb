# SPDX-License-Identifier: BSD-3-Clause
"""Trains a tiny GPT on several processes, in all ways of WRAP, and on one, and fails where the two
differ.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed/train.py

On as many GPUs through NCCL where --device is cuda, else on the CPU through gloo.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from sys import path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

path.insert(0, str(Path(__file__).resolve().parents[2]))

from flash_attn_cuda import flash_attn_func
from flash_attn_cuda.rotary import apply_rotary_emb

STEPS, BATCH, SEQLEN = 4, 4, 65
HEADS, WIDTH, VOCABULARY = 4, 64, 64


class Block(nn.Module):
    """Heads are as many as the projections have here: with tensor parallelism, a share of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = (2, (-1, WIDTH // HEADS))
        q, k, v = (project(y).unflatten(*heads) for project in (self.to_q, self.to_k, self.to_v))
        angles = torch.outer(
            torch.arange(q.shape[1], device=q.device), torch.logspace(0, -2, 8, device=q.device)
        )
        q, k = (apply_rotary_emb(t, angles.cos(), angles.sin()) for t in (q, k))
        return x + self.to_out(flash_attn_func(q, k, v, causal=True).flatten(2))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.to_logits = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.to_logits(x)


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy()
    if mesh.device_type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = dict.fromkeys(("to_q", "to_k", "to_v"), ColwiseParallel())
    for block in model.blocks:
        parallelize_module(block, mesh, {**plan, "to_out": RowwiseParallel()})
    return model


WRAP = {"ddp": ddp, "fsdp": fsdp, "tensor_parallel": tensor_parallel}


def train(
    model: nn.Module, parameters: list[nn.Parameter], share: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """The losses; parameters change. share: what of a batch this process sees."""
    # With tensor parallelism some parameters are DTensors, and some are not: no list of all.
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, foreach=False)
    generator = torch.Generator().manual_seed(1)
    device = parameters[0].device
    losses = []
    for _ in range(STEPS):
        # Some bytes follow others: what there is to learn.
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        tokens = share((first + 7 * torch.arange(SEQLEN)) % VOCABULARY).to(device)
        logits = model(tokens[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def whole(parameters: list[nn.Parameter]) -> Tensor:
    """All parameters as one vector."""
    values = (x.full_tensor() if isinstance(x, DTensor) else x for x in parameters)
    return torch.cat([x.detach().flatten() for x in values])


def compare(wrap: str, device: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = GPT().to(device)
    alone = copy.deepcopy(model)
    before = whole(list(alone.parameters()))
    expected_losses = train(alone, list(alone.parameters()), lambda batch: batch)

    wrapped = WRAP[wrap](model, init_device_mesh(device, (size,)))
    shards = wrap != "tensor_parallel"  # batches, not heads
    share = (lambda batch: batch.chunk(size)[rank]) if shards else (lambda batch: batch)
    losses = torch.stack(train(wrapped, list(model.parameters()), share))
    dist.all_reduce(losses)

    in_half = device == "cuda" and wrap == "fsdp"
    tolerance = 1e-2 if in_half else 1e-3 if device == "cuda" else 1e-5
    apart = (losses / size - torch.stack(expected_losses)).abs().max()
    if not apart <= tolerance * expected_losses[0]:
        raise AssertionError(f"{wrap}: losses {losses / size}, expected {expected_losses}")
    expected = whole(list(alone.parameters()))
    way = (expected - before).norm()
    apart = (whole(list(model.parameters())) - expected).norm()
    if not apart <= tolerance * way:
        raise AssertionError(f"{wrap}: parameters are {apart} apart after a way of {way}")
    if not expected_losses[-1] < 0.9 * expected_losses[0]:
        raise AssertionError(f"nothing was learned: {expected_losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        for wrap in WRAP:
            compare(wrap, arguments.device)
            gc.collect()  # models hold threads of the process group, which must end before it does
    finally:
        dist.destroy_process_group()
    os._exit(0)  # torch's threads may outlive the interpreter's end, which then aborts


if __name__ == "__main__":
    main()
