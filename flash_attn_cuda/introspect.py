# SPDX-License-Identifier: BSD-3-Clause
"""What this build contains, and which kernel a call would run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn_cuda._arguments import autocast, check_arguments, window_of
from flash_attn_cuda._ops import _C, allows_tf32, check_alike
from flash_attn_cuda._version import __version__

# What makes a problem one for the general rows of the kernel table, and for those of them that have
# the terms of a score.
TERMS = ("alibi_slopes", "dropout_p", "return_max_logit", "sinks", "softcap")
RULES = (
    *TERMS,
    "attn_bias",
    "attn_mask",
    "key_padding_mask",
    "document_ids",
    "prefix_lens",
    "block_mask",
)


@dataclass(frozen=True)
class Decision:
    """What one pass runs. ``kernel`` is None where nothing does, and ``error`` then says why.

    ``reasons`` tells for each row of the kernel table, by name, why it does not run, or "runs". The
    first that runs is chosen.
    """

    kernel: str | None
    error: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            if name != self.kernel:
                by_reason.setdefault(reason, []).append(name)
        lines = [self.kernel or f"no kernel: {self.error}"]
        for reason, names in by_reason.items():
            rows = ", ".join(names) if len(names) <= 3 else f"{len(names)} other kernels"
            note = "could run too; the first that can is taken" if reason == "runs" else reason
            lines.append(f"    not {rows}: {note}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``print`` it.

    ``copies`` tells which of q, k, v are copied first, and why.
    """

    device: str
    forward: Decision
    backward: Decision
    copies: dict[str, str]

    def __str__(self) -> str:
        lines = [f"on {self.device}", f"  forward: {self.forward}", f"  backward: {self.backward}"]
        lines += [f"  copies {name} first: {reason}" for name, reason in self.copies.items()]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **rules: Tensor | float | None,
) -> Explanation:
    """Which kernels :func:`flash_attn_func` would run for these arguments, and why not the others.

    Nothing is launched, and only shapes, strides, dtypes and devices of the tensors are read.

    Args:
        q, k, v, causal, window_size: as of :func:`flash_attn_func`.
        rules: attn_bias, attn_mask, key_padding_mask, document_ids, prefix_lens, block_mask,
            alibi_slopes, sinks, softcap, dropout_p and return_max_logit of it; only whether they
            are given, and not 0, is looked at.

    Returns:
        An :class:`Explanation`; its str() is a report.

    Raises:
        ValueError, TypeError: the tensors' ranks, devices or dtypes, or window_size.
        NotImplementedError: the tensors are on CUDA and this build or torch has no CUDA support.
    """
    unknown = set(rules) - set(RULES)
    if unknown:
        raise TypeError(f"explain: expected rules among {', '.join(RULES)}, got {sorted(unknown)}")
    given = {name for name, rule in rules.items() if isinstance(rule, Tensor) or rule}
    check_arguments(q, k, v, None)
    q, k, v = autocast(q, k, v)
    check_alike(q, k, v)
    window_left, window_right = window_of(causal, window_size)
    on_cuda = q.device.type == "cuda"
    device = "the CPU"
    compute_capability, smem_opt_in = 0, 0
    if on_cuda:
        index = q.device.index if q.device.index is not None else torch.cuda.current_device()
        compute_capability, smem_opt_in = _C.query_cuda_device(index)
        device = f"{torch.cuda.get_device_name(index)} (sm_{compute_capability})"

    def decide(pass_name: str) -> Decision:
        rules_of_pass = given if pass_name == "fwd" else given - {"return_max_logit"}
        decision: dict[str, Any] = _C.explain(
            pass_name=pass_name,
            dtype="tf32" if allows_tf32(q) else str(q.dtype).removeprefix("torch."),
            head_dim=max(q.shape[3], v.shape[3]),
            seqlen_q=q.shape[1],
            seqlen_k=k.shape[1],
            window_left=window_left,
            window_right=window_right,
            general_scores=bool(rules_of_pass),
            softcap="softcap" in rules_of_pass,
            on_cuda=on_cuda,
            compute_capability=compute_capability,
            smem_opt_in=smem_opt_in,
        )
        return Decision(decision["kernel"], decision.get("error"), decision["reasons"])

    reasons = {name: _why_copied(tensor) for name, tensor in (("q", q), ("k", k), ("v", v))}
    copies = {name: reason for name, reason in reasons.items() if reason is not None}
    return Explanation(device, decide("fwd"), decide("bwd"), copies)


def _why_copied(tensor: Tensor) -> str | None:
    reason: str | None = _C.why_copied(
        sizes=tuple(tensor.shape),
        strides=tensor.stride(),
        address=tensor.storage_offset() * tensor.element_size(),  # memory itself is aligned
        element_bytes=tensor.element_size(),
        on_cuda=tensor.device.type == "cuda",
    )
    return reason


def build_info() -> dict[str, Any]:
    """What was built.

    Returns:
        ``version``; ``cuda_version`` of the toolkit ("13.0") or None for a CPU-only build;
        ``architectures``, the GPU code inside ("sm_80" is machine code, "compute_80" is PTX for
        newer GPUs); ``cpu_isa``, the vector instructions that the CPU kernels use on this machine;
        ``kernels``, one dict per row of the kernel table.
    """
    info: dict[str, Any] = _C.build_info()
    cuda = info["cuda_version"]
    return {
        "version": __version__,
        "cuda_version": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        "architectures": info["architectures"],
        "cpu_isa": info["cpu_isa"],
        "kernels": _C.kernel_table(),
    }
