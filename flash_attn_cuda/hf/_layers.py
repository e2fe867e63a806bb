# SPDX-License-Identifier: BSD-3-Clause
"""What the attention layers of a model do with a mask, as the code of its modeling module tells."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layers:
    """Of the models that a configuration is for.

    compute_alone: attention never asks transformers' registry.
    know_causal: is_causal of a layer says what its mask would: transformers' own kernels, which get
        no mask where nothing is padded, rely on it.
    know_window: a layer tells its sliding window.
    """

    compute_alone: bool = False
    know_causal: bool = False
    know_window: bool = False


def asks_registry(layer: type[nn.Module]) -> bool:
    code = _code_of(layer)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def layers_of(config: type) -> Layers:
    """Layers of no module that is found know nothing."""
    module = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    return Layers() if module is None else _layers_in(module)


# What torch.compiler.assume_constant_result sets: torch need not trace the question.
layers_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _layers_in(module: ModuleType) -> Layers:
    members = vars(module).values()
    classes = [x for x in members if inspect.isclass(x) and issubclass(x, nn.Module)]
    layers = [x for x in classes if asks_registry(x)]
    if not layers:
        return Layers(compute_alone=any("Attention" in x.__name__ for x in classes))
    bases = [x for x in classes if PreTrainedModel in x.__bases__]
    told = [_keywords_of(x) for x in layers]
    of_kernels = ("softcap", "s_aux")  # which torch's attention lacks
    return Layers(
        know_causal=all(
            _supports(x, "_supports_sdpa")
            or (
                _supports(x, "_supports_flash_attn", "_supports_flash_attn_2")
                and any(name in names for names in told for name in of_kernels)
            )
            for x in bases
        ),
        know_window=all("sliding_window" in names for names in told),
    )


def _code_of(layer: type[nn.Module]) -> Any:
    return getattr(inspect.unwrap(layer.forward), "__code__", None)


def _keywords_of(layer: type[nn.Module]) -> set[str]:
    """Names of the arguments that its forward() passes to functions."""
    constants = (x for x in _code_of(layer).co_consts if isinstance(x, tuple))
    return {name for names in constants for name in names if isinstance(name, str)}


def _supports(model: type[nn.Module], *names: str) -> bool:
    return any(getattr(model, name, False) for name in names)
