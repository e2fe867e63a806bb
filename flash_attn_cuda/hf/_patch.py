# SPDX-License-Identifier: BSD-3-Clause
"""The name "fa_cuda" among transformers' attention implementations, and models that exist."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_attn_cuda.hf._attention import attention
from flash_attn_cuda.hf._layers import asks_registry
from flash_attn_cuda.hf._masks import mask_of

# Without "flash", by which transformers would look for another package.
NAME = "fa_cuda"

# What modules and configs may hold of the implementation, and what it becomes.
_HELD = {
    "_attn_implementation_internal": NAME,
    "_attn_implementation": NAME,
    "_use_sdpa": False,
    "_use_flash_attention_2": False,
}

# Of each patched model: holders, one of which may be the model, attributes, and what these were.
_Held = tuple[ReferenceType[Any], str, Any]
_before: WeakKeyDictionary[nn.Module, list[_Held]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_hf_model` did: names of modules, as model.named_modules() has them."""

    patched: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        kept = f"; {_listed(self.skipped)} stay as they are" if self.skipped else ""
        return f"{NAME} runs {_listed(self.patched)}{kept}"


def register() -> None:
    """Make "fa_cuda" an attention implementation of transformers: attn_implementation="fa_cuda" in
    from_pretrained() and from_config(). Once is enough; more often does no harm."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_of)


def patch_hf_model(model: nn.Module) -> PatchReport:
    """Run the attention of a model that exists on these kernels.

    Args:
        model: a transformers model, or a module around one or more.

    Returns:
        Which attention modules now do, and which do not, because they do not ask transformers'
        registry for their implementation. A warning names the latter, too.

    Raises:
        TypeError: no module.
        ValueError: no attention module of the model asks that registry.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    patched = tuple(name for name, module in modules.items() if asks_registry(type(module)))
    skipped = tuple(_other_attention(modules, patched))
    if not patched:
        what = _listed(skipped) if skipped else "it has no attention module"
        raise ValueError(
            f"model: expected one whose attention asks transformers.AttentionInterface for its "
            f"implementation, got {type(model).__name__}, which computes attention by itself: "
            f"{what}. Other versions of transformers may be able to"
        )
    register()
    before = _before.setdefault(model, [])
    for holder in _holders(modules, patched):
        for attribute, value in _HELD.items():
            if attribute in vars(holder) and vars(holder)[attribute] != value:
                before.append((ref(holder), attribute, vars(holder)[attribute]))
                setattr(holder, attribute, value)
    report = PatchReport(patched, skipped)
    if skipped:
        warnings.warn(str(report), stacklevel=2)
    return report


def unpatch_hf_model(model: nn.Module) -> None:
    """Give a model back the implementations that it had before :func:`patch_hf_model`.

    Raises:
        ValueError: the model is not patched.
    """
    if not isinstance(model, nn.Module) or model not in _before:
        raise ValueError(
            f"model: expected one that patch_hf_model() was given, got {type(model).__name__}"
        )
    for held, attribute, value in reversed(_before.pop(model)):
        holder = held()
        if holder is not None:
            setattr(holder, attribute, value)


def _other_attention(modules: dict[str, nn.Module], patched: tuple[str, ...]) -> Iterator[str]:
    """The innermost modules that are called attention, but are none of `patched`, nor around or
    inside of one."""
    around = {outer for name in patched for outer in _outer_names(name)}
    names = [n for n, m in modules.items() if "Attention" in type(m).__name__]
    around_others = {outer for name in names for outer in _outer_names(name)}
    for name in names:
        innermost = name not in around | around_others
        if innermost and not any(n in patched for n in (name, *_outer_names(name))):
            yield name


def _outer_names(name: str) -> Iterator[str]:
    """Of all modules around the one of this name."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _holders(modules: dict[str, nn.Module], patched: tuple[str, ...]) -> Iterator[Any]:
    """The attention modules, all modules around them, which make the masks, and their configs."""
    names = {*patched, *(outer for name in patched for outer in _outer_names(name))}
    seen: set[int] = set()
    for name in names:
        module = modules[name]
        for holder in (module, *(x for x in vars(module).values() if _is_config(x))):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield holder


def _is_config(value: object) -> bool:
    return "_attn_implementation_internal" in getattr(value, "__dict__", ())


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{rest}"
