# SPDX-License-Identifier: BSD-3-Clause
"""A GPT over bytes, small unless configured otherwise. The one line that differs from a textbook
is the call of attention, which is flash_attn_func unless another is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flash_attn_cuda import flash_attn_func


@dataclass(frozen=True)
class GPTConfig:
    context: int = 128
    layers: int = 3
    heads: int = 4
    width: int = 128
    vocabulary: int = 256  # every byte is a token
    # Of q, k, v and causal=; all tensors are (batch, seqlen, heads, head_dim).
    attention: Callable[..., Tensor] = flash_attn_func

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.attention = config.attention
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.to_out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, width) -> (batch, seqlen, width)"""
        # Views of one tensor, (batch, seqlen, heads, head_dim) each: the kernel takes any strides.
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, self.head_dim)).unbind(2)
        out = self.attention(rotate(q), rotate(k), v, causal=True)
        return self.to_out(out.flatten(2))  # type: ignore[no-any-return]


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of a (batch, seqlen, heads, head_dim) tensor: a
    query and a key then see how far apart they are."""
    seqlen, half = x.shape[1], x.shape[3] // 2
    frequency = 1000.0 ** -torch.linspace(0, 1, half, device=x.device)
    angle = torch.outer(torch.arange(seqlen, device=x.device), frequency)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width)
        self.to_logits = nn.Linear(config.width, config.vocabulary, bias=False)
        # The first guess is uniform, so the loss starts at log(256) = 5.5.
        nn.init.zeros_(self.to_logits.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen) of bytes -> (batch, seqlen, vocabulary) of logits for the next byte"""
        x = self.blocks(self.embedding(tokens))
        return self.to_logits(self.norm(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float = 0.7) -> bytes:
        """The prompt and `length` more bytes."""
        device = self.embedding.weight.device
        tokens = torch.tensor([list(prompt)], device=device)
        for _ in range(length):
            logits = self(tokens[:, -self.config.context :])[:, -1].float()
            probabilities = torch.softmax(logits / temperature, dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
        return bytes(tokens[0].tolist())
