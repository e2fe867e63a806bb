# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of the public functions whose kernels come later, each with a value that is refused."""

from __future__ import annotations

import torch

LATER: dict[str, object] = {"block_table": torch.zeros(2, 1, dtype=torch.int32)}
