# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of the public functions whose kernels come later, each with a value that is refused."""

from __future__ import annotations

import torch

LATER: dict[str, object] = {
    "dropout_p": 0.1,
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "attn_bias": torch.zeros(8, 8),
    "attn_mask": torch.ones(8, 8, dtype=torch.bool),
    "key_padding_mask": torch.ones(2, 8, dtype=torch.bool),
    "seqlens_q": torch.ones(2, dtype=torch.int32),
    "seqlens_k": torch.ones(2, dtype=torch.int32),
    "document_ids": torch.zeros(2, 8, dtype=torch.int32),
    "prefix_lens": torch.ones(2, dtype=torch.int32),
    "sinks": torch.zeros(4),
    "block_mask": torch.ones(1, 1, dtype=torch.bool),
    "return_max_logit": True,
    "generator": torch.Generator(),
}
