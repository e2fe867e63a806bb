# SPDX-License-Identifier: BSD-3-Clause
"""What the modules have in common with flash-attn's, and what they refuse."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from flash_attn_cuda.modules import (
    MHA,
    FlashCrossAttention,
    FlashSelfAttention,
    get_alibi_slopes,
)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"Wqkv": (144, 48), "out_proj": (48, 48)}),
        ({"num_heads_kv": 2}, {"Wqkv": (80, 48), "out_proj": (48, 48)}),
        (
            {"cross_attn": True, "num_heads_kv": 2},
            {"Wq": (48, 48), "Wkv": (32, 48), "out_proj": (48, 48)},
        ),
        (
            {"rotary_emb_dim": 8, "use_alibi": True},
            {"Wqkv": (144, 48), "out_proj": (48, 48)},
        ),
    ],
)
def test_state_dict(options: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> None:
    mha = MHA(48, 6, **options)
    expected = {f"{name}.weight": size for name, size in shapes.items()}
    expected |= {f"{name}.bias": size[:1] for name, size in shapes.items()}
    assert {name: tuple(t.shape) for name, t in mha.state_dict().items()} == expected


def test_signatures_are_those_of_flash_attn() -> None:
    def names(function: Any) -> str:
        parameters = inspect.signature(function).parameters.values()
        return " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    assert names(MHA) == (
        "embed_dim num_heads num_heads_kv cross_attn qkv_proj_bias out_proj_bias dropout "
        "softmax_scale causal layer_idx dwconv rotary_emb_dim rotary_emb_base "
        "rotary_emb_scale_base rotary_emb_interleaved use_alibi window_size fused_bias_fc "
        "use_flash_attn return_residual checkpointing device dtype"
    )
    assert names(MHA.forward) == (
        "self x x_kv key_padding_mask cu_seqlens max_seqlen mixer_subset inference_params"
    )
    for attention in (FlashSelfAttention, FlashCrossAttention):
        assert names(attention) == (
            "causal softmax_scale attention_dropout window_size alibi_slopes deterministic"
        )
    assert names(FlashSelfAttention.forward) == "self qkv causal cu_seqlens max_seqlen"
    assert names(FlashCrossAttention.forward) == (
        "self q kv causal cu_seqlens max_seqlen cu_seqlens_k max_seqlen_k"
    )


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (4, [2, 4, 6, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (7, [2, 4, 6, 8, 1, 3, 5]),
    ],
)
def test_alibi_slopes(num_heads: int, exponents: list[int]) -> None:
    assert get_alibi_slopes(num_heads) == [2.0**-e for e in exponents]
    assert torch.tensor(get_alibi_slopes(num_heads)).shape == (num_heads,)


def test_alibi_slopes_need_heads() -> None:
    with pytest.raises(ValueError, match=r"^num_heads: expected 1 or more, got 0$"):
        get_alibi_slopes(0)


def test_weights_that_come_later() -> None:
    """A module made on the meta device, as loaders of checkpoints do it."""
    options = {"use_alibi": True, "rotary_emb_dim": 8, "causal": True}
    given = MHA(48, 6, **options)
    mha = MHA(48, 6, device="meta", **options).to_empty(device="cpu")
    mha.load_state_dict(given.state_dict())
    x = torch.randn(2, 17, 48)
    assert torch.equal(mha(x), given(x))


def test_what_a_module_says_of_itself() -> None:
    mha = MHA(48, 6, 2, causal=True, window_size=(8, 0), use_alibi=True, softcap=5.0)
    assert "num_heads=6, num_heads_kv=2" in repr(mha)
    assert "causal=True, window_size=(8, 0), softcap=5.0, alibi_slopes=(6,)" in repr(mha.inner_attn)
    assert FlashSelfAttention().extra_repr() == ""


X = torch.zeros(2, 5, 48)
ROWS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dwconv": True}, NotImplementedError, r"^dwconv: expected False"),
        ({"fused_bias_fc": True}, NotImplementedError, r"^fused_bias_fc: expected False"),
        ({"num_heads": 5}, ValueError, r"^num_heads: expected a divisor of embed_dim 48, got 5"),
        ({"num_heads": 0}, ValueError, r"^num_heads: expected a divisor of embed_dim 48, got 0"),
        ({"num_heads_kv": 4}, ValueError, r"^num_heads_kv: .* of num_heads 6, got 4"),
        ({"num_heads_kv": 0}, ValueError, r"^num_heads_kv: .* of num_heads 6, got 0"),
        ({"rotary_emb_dim": 10}, ValueError, r"^rotary_emb_dim: .* 0 to head_dim 8, got 10"),
        ({"rotary_emb_dim": -2}, ValueError, r"^rotary_emb_dim: .* got -2"),
        ({"rotary_emb_dim": 3}, ValueError, r"^dim: expected a positive even number, got 3"),
        ({"rotary_emb_dim": 4, "cross_attn": True}, NotImplementedError, r"^rotary_emb_dim: "),
        ({"dropout": 1.5}, ValueError, r"between 0 and 1, but got 1.5"),
    ],
)
def test_errors_of_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MHA(**{"embed_dim": 48, "num_heads": 6, **options})


@pytest.mark.parametrize(
    ("cross_attn", "arguments", "error", "message"),
    [
        (False, {"x": [1]}, TypeError, r"^x: expected a torch.Tensor, got list"),
        (
            False,
            {"x": X[0]},
            ValueError,
            r"^x: expected shape \(batch, seqlen, 48\), got \(5, 48\)",
        ),
        (False, {"x": X[..., :6]}, ValueError, r"^x: .* got \(2, 5, 6\)"),
        (False, {"cu_seqlens": ROWS}, ValueError, r"^x: expected shape \(total, 48\), got"),
        (False, {"x_kv": X}, ValueError, r"^x_kv: expected None without cross_attn"),
        (False, {"mixer_subset": 0}, ValueError, r"^mixer_subset: expected None without cross"),
        (True, {"x_kv": X[0]}, ValueError, r"^x_kv: expected shape \(batch, seqlen, 48\)"),
        (
            True,
            {"x": X[0], "cu_seqlens": ROWS, "mixer_subset": 0},
            ValueError,
            r"^mixer_subset: expected None beside cu_seqlens",
        ),
        (
            False,
            {"x": X[0], "cu_seqlens": ROWS, "key_padding_mask": X[..., 0] == 0},
            ValueError,
            r"^key_padding_mask: expected None beside cu_seqlens",
        ),
        (
            True,
            {"x": X[0], "x_kv": X[0], "cu_seqlens": ROWS},
            ValueError,
            r"^cu_seqlens_k: expected a tensor",
        ),
        (True, {"cu_seqlens_k": ROWS}, ValueError, r"^cu_seqlens: expected a tensor"),
    ],
)
def test_errors_of_inputs(
    cross_attn: bool, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MHA(48, 6, cross_attn=cross_attn)(**{"x": X, **arguments})


def test_snippet(device: str) -> None:
    layer = MHA(512, 8, num_heads_kv=2, causal=True, rotary_emb_dim=64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = layer(torch.randn(2, 1024, 512, device=device))  # (batch, seqlen, embed_dim)
    assert out.shape == (2, 1024, 512)
    assert out.isfinite().all()
