# SPDX-License-Identifier: BSD-3-Clause
"""Counts the operators that run: what called none of ours did not run on our kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

OURS = "flash_attn_cuda::"


class CountOperators(TorchDispatchMode):
    """names: how often each operator ran inside of the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names[operator.name()] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def calls(self) -> Counter[str]:
        """Of ours alone, by names like fwd and bwd_general, without the suffix of eager twins."""
        calls: Counter[str] = Counter()
        for name, count in self.names.items():
            if name.startswith(OURS):
                calls[name.removeprefix(OURS).removesuffix("_eager")] += count
        return calls

    @property
    def forward(self) -> int:
        return self.calls["fwd"] + self.calls["fwd_general"]

    @property
    def backward(self) -> int:
        return self.calls["bwd"] + self.calls["bwd_general"]
