# SPDX-License-Identifier: BSD-3-Clause
"""A call of every public function, for tests of what torch makes of them: compiled, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda import (
    bert_padding,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    lowlevel,
    rotary,
)

HEAD_DIM = 16
POSITIONS = 400  # more than any length of the tests


@dataclass(frozen=True)
class Make:
    """Inputs for a length, on a device."""

    seqlen: int
    device: str

    def x(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        on_cuda = self.device == "cuda"
        dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
        return torch.randn(*shape, device=self.device, dtype=dtype, requires_grad=grad)

    def padded(self, grad: bool = True) -> list[Tensor]:
        return [self.x(2, self.seqlen, heads, HEAD_DIM, grad=grad) for heads in (4, 2, 2)]

    def packed(self) -> list[Tensor]:
        return [self.x(self.seqlen, heads, HEAD_DIM) for heads in (4, 2, 2)]

    def int32(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.int32)

    def first_rows(self) -> Tensor:
        return self.int32(0, self.seqlen // 3, self.seqlen)

    def is_token(self) -> Tensor:
        lengths = self.int32(self.seqlen, self.seqlen // 2)
        return torch.arange(self.seqlen, device=self.device) < lengths[:, None]

    def tables(self) -> tuple[Tensor, Tensor]:
        angles = torch.rand(POSITIONS, HEAD_DIM // 2, device=self.device)
        return angles.cos(), angles.sin()


def _rules(make: Make) -> list[Tensor]:
    n, device = make.seqlen, make.device
    return [
        make.x(4, n, n),
        torch.rand(n, n, device=device) < 0.8,
        make.is_token(),
        make.int32(n, n - 3),
        torch.arange(n, device=device, dtype=torch.int32).expand(2, n) // 40,
        make.int32(0, 3),
        torch.ones(-(-n // 128), -(-n // 128), device=device, dtype=torch.bool),
    ]


def _all(
    *tensors: Tensor, dropout_p: float = 0.2, window_size: tuple[int, int] = (60, 5)
) -> tuple[Tensor, ...]:
    q, k, v, slopes, sinks, bias, mask, padding, lengths, ids, prefix, blocks = tensors
    return flash_attn_func(
        *(q, k, v, dropout_p, 0.3, True, window_size, 5.0, slopes, True),
        return_lse=True,
        attn_bias=bias,
        attn_mask=mask,
        key_padding_mask=padding,
        seqlens_q=lengths,
        seqlens_k=lengths,
        document_ids=ids,
        prefix_lens=prefix,
        sinks=sinks,
        block_mask=blocks,
        return_max_logit=True,
    )


def _varlen_all(*tensors: Tensor) -> tuple[Tensor, ...]:
    q, k, v, first_rows, used, bias, slopes, sinks = tensors
    return flash_attn_varlen_func(
        *(q, k, v, first_rows, first_rows, None, None, 0.2, None, True, (60, 5)),
        softcap=4.0,
        alibi_slopes=slopes,
        deterministic=True,
        return_lse=True,
        seqused_q=used,
        seqused_k=used,
        attn_bias=bias,
        attn_mask=bias < 1,
        prefix_lens=used,
        sinks=sinks,
        return_max_logit=True,
    )


def _backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    """With what forward returned, as ring attention does."""
    of_scores = {"dropout_p": 0.2, "attn_bias": bias, "softcap": 3.0}
    out, lse, state = lowlevel.forward(q, k, v, **of_scores)
    gradients = lowlevel.backward(
        *(dout, q, k, v, out, lse),
        dlse=dlse,
        rng_state=state,
        deterministic=True,
        needs_dbias=True,
        **of_scores,
    )
    return gradients.dq, gradients.dk, gradients.dv, gradients.dbias


def _backward_inputs(make: Make) -> list[Tensor]:
    n = make.seqlen
    dlse = make.x(2, 4, n, grad=False, dtype=torch.float32)
    qkv = make.padded(grad=False)
    return [torch.randn_like(qkv[0]), dlse, *qkv, make.x(4, n, n, grad=False)]


def _merge_inputs(make: Make) -> list[Tensor]:
    shapes = [(2, make.seqlen, 4, HEAD_DIM), (2, 4, make.seqlen)]
    return [make.x(*shape, dtype=torch.float32) for shape in (*shapes, *shapes)]


def _padded_attention(x: Tensor, is_token: Tensor) -> Tensor:
    """As users of flash-attn pack and unpack."""
    tokens, indices, first_rows, longest, _ = bert_padding.unpad_input(x, is_token)
    out = flash_attn_varlen_func(
        *(tokens, tokens, tokens, first_rows, first_rows, longest, longest),
        causal=True,
        deterministic=True,
    )
    return bert_padding.pad_input(out, indices, x.shape[0], x.shape[1])


def _concatenated(make: Make) -> list[Tensor]:
    lengths = torch.zeros(2, make.seqlen, device=make.device, dtype=torch.int64)
    lengths[0, :2] = torch.tensor([make.seqlen // 2, 5])
    lengths[1, 0] = make.seqlen
    return [make.x(2, make.seqlen, 8), lengths]


_rotate = rotary.RotaryEmbedding(HEAD_DIM)
_rotate_xpos = rotary.RotaryEmbedding(HEAD_DIM, scale_base=512.0)


@dataclass(frozen=True)
class Call:
    """run(*inputs(make)) calls the public function of the same name, and perhaps others."""

    run: Callable[..., Any]
    inputs: Callable[[Make], Iterable[Any]]


# By the public name, and what is special. Rotary's in-place functions turn copies, for torch does
# not let a leaf be changed; the gradients of those that RotaryEmbedding calls are taken there.
CALLS: dict[str, Call] = {
    "flash_attn_func": Call(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, deterministic=True, return_lse=True),
        Make.padded,
    ),
    "flash_attn_func: all": Call(
        _all, lambda make: [*make.padded(), make.x(2, 4), make.x(4), *_rules(make)]
    ),
    "flash_attn_qkvpacked_func": Call(
        lambda qkv: flash_attn_qkvpacked_func(qkv, deterministic=True),
        lambda make: [make.x(2, make.seqlen, 3, 4, HEAD_DIM)],
    ),
    "flash_attn_kvpacked_func": Call(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, deterministic=True),
        lambda make: [make.padded()[0], make.x(2, make.seqlen, 2, 2, HEAD_DIM)],
    ),
    "flash_attn_varlen_func: all": Call(
        _varlen_all,
        lambda make: [
            *make.packed(),
            make.first_rows(),
            make.int32(make.seqlen // 3 - 1, 7),
            make.x(4, make.seqlen, make.seqlen),
            make.x(4),
            make.x(4),
        ],
    ),
    "flash_attn_varlen_func: probabilities": Call(
        lambda q, k, v, rows: flash_attn_varlen_func(
            *(q, k, v, rows, rows, None, None, 0.2), deterministic=True, return_attn_probs=True
        ),
        lambda make: [*make.packed(), make.first_rows()],
    ),
    "flash_attn_varlen_qkvpacked_func": Call(
        lambda qkv, rows, longest: flash_attn_varlen_qkvpacked_func(
            qkv, rows, longest, deterministic=True
        ),
        lambda make: [make.x(make.seqlen, 3, 4, HEAD_DIM), make.first_rows(), make.seqlen],
    ),
    "flash_attn_varlen_kvpacked_func": Call(
        lambda q, kv, rows, longest: flash_attn_varlen_kvpacked_func(
            *(q, kv, rows, rows, longest, longest), deterministic=True, return_lse=True
        ),
        lambda make: [
            *(make.packed()[0], make.x(make.seqlen, 2, 2, HEAD_DIM)),
            *(make.first_rows(), make.seqlen),
        ],
    ),
    "lowlevel.forward": Call(
        lambda q, k, v: lowlevel.forward(q, k, v, causal=True, return_max_logit=True), Make.padded
    ),
    "lowlevel.backward": Call(_backward, _backward_inputs),
    "lowlevel.merge": Call(lowlevel.merge, _merge_inputs),
    "lowlevel.dropout_mask": Call(
        lambda state, x: lowlevel.dropout_mask(state, 0.3, 2, 3, x.shape[1], 2 * x.shape[1]),
        lambda make: [torch.tensor([5, 7], device=make.device), make.x(2, make.seqlen)],
    ),
    "lowlevel.new_rng_state": Call(
        lambda x: (2 * x, lowlevel.new_rng_state(x.device)), lambda make: [make.x(2, make.seqlen)]
    ),
    "rotary.apply_rotary_emb": Call(
        lambda x, cos, sin, starts: rotary.apply_rotary_emb(
            x, cos, sin, interleaved=True, seqlen_offsets=starts
        ),
        lambda make: [make.padded()[0], *make.tables(), make.int32(3, 0)],
    ),
    "rotary.apply_rotary_emb: packed": Call(
        lambda x, cos, sin, rows: rotary.apply_rotary_emb(
            x.clone(), cos, sin, inplace=True, cu_seqlens=rows
        ),
        lambda make: [make.packed()[0], *make.tables(), make.first_rows()],
    ),
    "rotary.apply_rotary_emb_qkv_": Call(
        lambda qkv, cos, sin: rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin),
        lambda make: [make.x(2, make.seqlen, 3, 4, HEAD_DIM, grad=False), *make.tables()],
    ),
    "rotary.apply_rotary_emb_kv_": Call(
        lambda kv, cos, sin: rotary.apply_rotary_emb_kv_(kv.clone(), cos, sin, seqlen_offsets=2),
        lambda make: [make.x(2, make.seqlen, 2, 4, HEAD_DIM, grad=False), *make.tables()],
    ),
    "rotary.RotaryEmbedding": Call(
        lambda qkv, starts: _rotate(qkv.clone(), seqlen_offset=starts, max_seqlen=POSITIONS),
        lambda make: [make.x(2, make.seqlen, 3, 4, HEAD_DIM), make.int32(3, 0)],
    ),
    "rotary.RotaryEmbedding: xPos": Call(
        lambda q, kv: _rotate_xpos(q.clone(), kv.clone()),
        lambda make: [make.padded()[0], make.x(2, make.seqlen, 2, 2, HEAD_DIM)],
    ),
    "bert_padding.unpad_input": Call(
        bert_padding.unpad_input,
        lambda make: [make.x(2, make.seqlen, 4, HEAD_DIM), make.is_token()],
    ),
    "bert_padding.pad_input": Call(
        _padded_attention,
        lambda make: [make.x(2, make.seqlen, 4, HEAD_DIM), make.is_token()],
    ),
    "bert_padding.unpad_input_for_concatenated_sequences": Call(
        bert_padding.unpad_input_for_concatenated_sequences, _concatenated
    ),
    "bert_padding.index_first_axis": Call(
        bert_padding.index_first_axis,
        lambda make: [make.x(make.seqlen, 8), torch.randperm(make.seqlen, device=make.device)],
    ),
    "bert_padding.index_put_first_axis": Call(
        lambda x, rows: bert_padding.index_put_first_axis(x, rows, 2 * x.shape[0]),
        lambda make: [make.x(make.seqlen, 8), torch.randperm(make.seqlen, device=make.device)],
    ),
}


def outcome(run: Callable[..., Any], inputs: Iterable[Any], seed: int = 3) -> list[Any]:
    """What a call returns, then the gradients of its inputs, with torch's generator at a seed."""
    torch.manual_seed(seed)
    inputs = list(inputs)
    results = run(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    differentiable = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gradients: Iterable[Tensor | None] = ()
    if differentiable and leaves:
        upstream = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True)
    values = (x.detach() if isinstance(x, Tensor) else x for x in results)
    return [*values, [x.requires_grad for x in results if isinstance(x, Tensor)], *gradients]
