# SPDX-License-Identifier: BSD-3-Clause
"""The cases that every kernel family must pass, in forward and backward.

A full product of what can vary would be millions of cases. Instead each list varies one thing
through all its values, and LENGTHS, which runs through every pair of lengths, draws everything else
at random with a fixed seed, so that most pairs of properties meet.
"""

from __future__ import annotations

import random

from tests.support.cases import CUDA_DTYPES, DATA, DOUTS, LAYOUTS, Case

DTYPES = tuple(CUDA_DTYPES)
HEADS = ((1, 1), (2, 2), (4, 2), (6, 3), (8, 1), (7, 1))  # (heads, heads_kv)
WINDOWS = ((0, 0), (0, -1), (-1, 0), (5, 0), (17, 3), (64, 64), (-1, 7), (9, -1), (1000, 1000))

# Around the edges of the tiles, and primes.
EDGES = (1, 2, 7, 31, 63, 64, 65, 127, 129, 131)


def _lengths() -> list[Case]:
    choice = random.Random(0).choice
    cases = []
    for seqlen_q in EDGES:
        for seqlen_k in EDGES:
            heads, heads_kv = choice(HEADS)
            layouts = [name for name in LAYOUTS if name != "packed" or seqlen_q == seqlen_k]
            cases.append(
                Case(
                    batch=choice((1, 2, 3)),
                    seqlen_q=seqlen_q,
                    seqlen_k=seqlen_k,
                    heads=heads,
                    heads_kv=heads_kv,
                    head_dim=choice((16, 32, 40, 64, 72, 100, 128)),
                    dtype=choice(DTYPES),
                    causal=choice((False, True)),
                    window=choice(((-1, -1), (-1, -1), *WINDOWS)),
                    softmax_scale=choice((None, None, None, -0.2, 0.7)),
                    layout=choice(layouts),
                    data=choice(DATA),
                    dout=choice(DOUTS),
                    dlse=choice((False, True)),
                    seed=len(cases),
                )
            )
    return cases


LENGTHS = _lengths()
LONG = [
    Case(batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=2, heads_kv=1, head_dim=64, **rest)
    for seqlen_q, seqlen_k in ((521, 521), (300, 700), (700, 300), (1, 1031), (1031, 1))
    for rest in (
        {"dtype": "bfloat16"},
        {"dtype": "float32", "causal": True},
        {"dtype": "float16", "window": (100, 30), "dlse": True},
    )
]
HEAD_DIMS = [
    Case(seqlen_q=65, seqlen_k=67, head_dim=head_dim, dtype=dtype, causal=True, dlse=True)
    for head_dim in (1, 5, 8, 40, 64, 72, 80, 96, 100, 128, 129, 160, 192, 256, 512)
    for dtype in DTYPES
]
LAYOUT_CASES = [
    Case(
        batch=batch,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        heads=4,
        heads_kv=2,
        head_dim=40,
        dtype=dtype,
        layout=layout,
    )
    for layout in LAYOUTS
    for batch, seqlen, dtype in ((2, 66, "float32"), (1, 3, "bfloat16"), (2, 1, "float16"))
]
MASKS = [
    Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, window=window, causal=causal, dlse=True)
    for seqlen_q, seqlen_k, dtype in (
        (130, 130, "float32"),
        (70, 140, "bfloat16"),
        (140, 70, "float16"),
        (200, 1, "float64"),
    )
    for window in WINDOWS
    for causal in (False, True)
]
HEAD_COUNTS = [
    Case(heads=heads, heads_kv=heads_kv, seqlen_q=40, seqlen_k=70, dtype=dtype, causal=True)
    for heads, heads_kv in (*HEADS, (16, 2), (12, 12))
    for dtype in ("float32", "bfloat16")
]
VALUES = [
    Case(seqlen_q=100, seqlen_k=100, data=data, dtype=dtype, causal=causal)
    for data in DATA
    for dtype in DTYPES
    for causal in (False, True)
]
SCALES = [
    Case(seqlen_q=70, seqlen_k=90, softmax_scale=scale, dtype=dtype, causal=True)
    for scale in (0.0, -0.5, 1e-3, 8.0, -8.0)
    for dtype in ("float64", "float32", "bfloat16")
]
GRADIENTS = [
    Case(seqlen_q=70, seqlen_k=90, dout=dout, dtype=dtype, dlse=dlse)
    for dout in DOUTS
    for dtype in ("float32", "bfloat16")
    for dlse in (False, True)
]
DETERMINISTIC = [
    Case(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=4,
        heads_kv=2,
        head_dim=head_dim,
        dtype="bfloat16",
        deterministic=True,
        **mask,
    )
    for seqlen_q, seqlen_k in ((150, 270), (200, 100))
    for head_dim in (64, 192)
    for mask in ({}, {"causal": True}, {"window": (40, 20)})
]
EMPTY = [
    Case(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        causal=causal,
        dlse=True,
        deterministic=causal,
    )
    for batch in (0, 2)
    for seqlen_q in (0, 5)
    for seqlen_k in (0, 5)
    for causal in (False, True)
    if not batch * seqlen_q * seqlen_k
]

SUITE = list(
    dict.fromkeys(
        LENGTHS
        + LONG
        + HEAD_DIMS
        + LAYOUT_CASES
        + MASKS
        + HEAD_COUNTS
        + VALUES
        + SCALES
        + GRADIENTS
        + DETERMINISTIC
        + EMPTY
    )
)
