# SPDX-License-Identifier: BSD-3-Clause
"""Counts the calls of our operators: what did not call one did not run on our kernels."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOperators(TorchDispatchMode):
    """forward, backward: how many of each ran inside of the context."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = str(operator.name()).partition("::")
        if namespace == "flash_attn_cuda":
            self.forward += name.startswith("fwd")
            self.backward += name.startswith("bwd")
        return operator(*args, **(kwargs or {}))
