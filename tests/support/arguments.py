# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of the public functions whose kernels come later, each with a value that is refused."""

from __future__ import annotations

import torch

LATER: dict[str, object] = {
    "dropout_p": 0.1,
    "softcap": 30.0,
    "alibi_slopes": torch.ones(4),
    "block_table": torch.zeros(2, 1, dtype=torch.int32),
    "sinks": torch.zeros(4),
    "return_max_logit": True,
    "generator": torch.Generator(),
}
