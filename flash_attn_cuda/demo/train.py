# SPDX-License-Identifier: BSD-3-Clause
"""Train the GPT on text that every machine with Python has: the standard library's sources."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn_cuda.demo.gpt import GPT, GPTConfig

PROMPT = b"def "
SAMPLE_LENGTH = 300


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    losses: list[float]  # nats per byte, one per step
    sample: str

    @property
    def final_loss(self) -> float:
        """Mean of the last steps: one batch alone is noisy."""
        last = self.losses[-20:]
        return sum(last) / len(last)


def train(device: str, config: TrainConfig, model_config: GPTConfig | None = None) -> Trained:
    """Train from scratch, with a progress bar; bfloat16 autocast on a GPU, float32 on the CPU."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError(
            "the progress bar needs tqdm: pip install tqdm, or pass --skip-training"
        ) from error

    torch.manual_seed(config.seed)
    model = GPT(model_config or GPTConfig()).to(device)
    run = steps(model, standard_library_sources().to(device), config)
    losses: list[float] = []
    with tqdm(run, total=config.steps, desc="training", unit="step") as progress:
        for loss in progress:
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

    with _mixed_precision(device):
        sample = model.generate(PROMPT, length=SAMPLE_LENGTH)
    return Trained(losses, sample.decode("utf-8", errors="replace"))


def steps(model: GPT, text: Tensor, config: TrainConfig) -> Iterator[Tensor]:
    """Train a model on its device, where the text is too, and yield the loss of each step.

    The excerpts depend on the seed, the batch and the length alone. Nothing here waits for a GPU:
    to read a loss, a scalar there, does.
    """
    generator = torch.Generator().manual_seed(config.seed)
    length = model.config.context + 1
    shape = (config.steps, config.batch, 1)
    starts = torch.randint(len(text) - length, shape, generator=generator).to(text.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
    )
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        tokens = text[starts[step] + torch.arange(length, device=text.device)].long()
        with _mixed_precision(text.device.type):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.detach()


def standard_library_sources(limit: int = 8 << 20) -> Tensor:
    """About `limit` bytes of the standard library's top-level modules and packages, as uint8."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name in ("test", "site-packages", "dist-packages"):
            continue
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if len(text) < 1 << 16:
        raise RuntimeError(
            f"the demo trains on the Python sources of the standard library, and {library} holds "
            f"only {len(text)} bytes of them"
        )
    return torch.frombuffer(text, dtype=torch.uint8)


def _mixed_precision(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _schedule(step: int, config: TrainConfig) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * progress)
