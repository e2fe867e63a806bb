# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled module, or says in one sentence why it cannot and what to do."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

MINIMUM_TORCH = (2, 10)

_PACKAGE = Path(__file__).resolve().parent


def load_extension() -> ModuleType:
    """Import ``flash_attn_cuda._C``, which also registers the operators with torch.

    Raises:
        ImportError: torch is older than 2.10; or this is the uncompiled source tree; or the
            compiled module does not fit the running Python. The message says what to do.
    """
    running = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if running < MINIMUM_TORCH:
        raise ImportError(
            f"flash_attn_cuda needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer, and the "
            f"running torch is {torch.__version__}: upgrade torch; flash_attn_cuda itself need "
            "not be rebuilt"
        )
    _warn_of_flash_attn_1()
    try:
        return importlib.import_module("flash_attn_cuda._C")
    except ImportError as error:
        raise ImportError(_why_not_loaded(error)) from error


def _why_not_loaded(error: ImportError) -> str:
    built = sorted(path.name for path in _PACKAGE.glob("_C.*"))
    tag = importlib.machinery.EXTENSION_SUFFIXES[0]
    if built:
        if any(name == f"_C{tag}" for name in built):
            return (
                f"flash_attn_cuda's compiled module {_PACKAGE / f'_C{tag}'} does not load: {error}"
            )
        return (
            f"flash_attn_cuda in {_PACKAGE} was built for another Python ({', '.join(built)}; "
            f"this one needs _C{tag}): reinstall it with this Python"
        )
    if (_PACKAGE.parent / "setup.py").exists() and (_PACKAGE.parent / "csrc").exists():
        return (
            f"this is flash_attn_cuda's source tree ({_PACKAGE}), which is not compiled and hides "
            "any installed flash_attn_cuda: run Python from another folder, or compile the tree "
            "in place with 'pip install --no-build-isolation -e .'"
        )
    return (
        f"flash_attn_cuda in {_PACKAGE} has no compiled module: reinstall it with 'pip install .' "
        "in its source tree"
    )


def _warn_of_flash_attn_1() -> None:
    """flash-attn 1.x has a compiled module of our name; the first on sys.path hides the other."""
    for folder in sys.path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            module = Path(folder or ".") / f"flash_attn_cuda{suffix}"
            if module.is_file():
                warnings.warn(
                    f"flash-attn 1.x's compiled module {module} has the same name as the package "
                    "flash_attn_cuda, so flash-attn 1.x cannot be used beside it: uninstall one "
                    "of the two ('pip uninstall flash-attn')",
                    stacklevel=3,
                )
                return
