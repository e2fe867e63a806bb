# SPDX-License-Identifier: BSD-3-Clause
"""A test case: everything that decides the inputs of one attention call, in one frozen value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.poison import Embedded, embed

# What the CUDA kernels take instead of each dtype.
CUDA_DTYPES = {
    "float64": "float16",
    "float32": "bfloat16",
    "float16": "float16",
    "bfloat16": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    """One attention problem. The defaults are small and plain; a test names what it varies."""

    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    layout: str = "bshd"  # of q, k and v; one of LAYOUTS
    data: str = "normal"  # values of q, k and v; one of DATA
    dout: str = "normal"  # one of DOUTS
    dlse: bool = False  # does a gradient reach the LSE?
    deterministic: bool = False
    seed: int = 0
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scale(self) -> float:
        default = 1.0 / math.sqrt(self.head_dim)
        return default if self.softmax_scale is None else self.softmax_scale

    @property
    def mask_arguments(self) -> dict[str, object]:
        return {
            "causal": self.causal,
            "window_size": self.window,
            "softmax_scale": self.softmax_scale,
        }

    def on(self, device: str) -> Case:
        """The same problem on another device, in a dtype that the device takes."""
        dtype = CUDA_DTYPES[self.dtype] if device.startswith("cuda") else self.dtype
        return dataclasses.replace(self, device=device, dtype=dtype)

    def changed_fields(self) -> dict[str, object]:
        plain = Case()
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != getattr(plain, name)
        }

    def __str__(self) -> str:
        words = (
            f"{name}={value}".replace(" ", "") for name, value in self.changed_fields().items()
        )
        return "-".join(words) or "plain"

    def command(self) -> str:
        """One line for a shell that repeats this case."""
        return f"python -m tests.support.compare '{json.dumps(self.changed_fields())}'"

    @staticmethod
    def from_json(text: str) -> Case:
        fields = json.loads(text)
        if "window" in fields:
            fields["window"] = tuple(fields["window"])
        return Case(**fields)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradients of both results; q, k and v lie in NaN-filled buffers."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    buffers: tuple[Embedded, ...]

    def check_untouched(self) -> None:
        for buffer in self.buffers:
            buffer.check_untouched()


# Order of the dimensions in memory, outermost first, of a (batch, seqlen, heads, head_dim) tensor.
_ORDERS = {
    "bshd": (0, 1, 2, 3),
    "bhsd": (0, 2, 1, 3),
    "sbhd": (1, 0, 2, 3),
    "bshd_reversed": (3, 2, 1, 0),
}
LAYOUTS = (
    "bshd",
    "bhsd",  # a transposed view
    "sbhd",
    "bshd_reversed",  # head_dim outermost in memory: the last dimension is strided
    "strided_dim",  # every second element of the last dimension
    "sliced",  # gaps between rows, heads and batches, of odd lengths
    "offset",  # starts one element after an aligned address
    "packed",  # views of one (batch, seqlen, heads + 2 heads_kv, head_dim) tensor
    "expanded_heads",  # k and v: stride 0 over the heads
    "expanded_batch",  # k and v: stride 0 over the batch
    "unit_strides",  # meaningless strides in dimensions of size 1
)
DATA = ("normal", "sparse", "outlier", "large", "constant", "one_hot")
DOUTS = ("normal", "expanded", "transposed", "strided_dim", "zeros", "one_hot")


def make_inputs(case: Case) -> Inputs:
    generator = case.generator()
    q_shape = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    kv_shape = (case.batch, case.seqlen_k, case.heads_kv, case.head_dim)
    q, k, v = (
        _values(case.data, shape, generator).to(case.torch_dtype)
        for shape in (q_shape, kv_shape, kv_shape)
    )
    if case.layout == "packed":
        qkv = embed(torch.cat([q, k, v], dim=2), case.device)
        parts = qkv.view.split([case.heads, case.heads_kv, case.heads_kv], dim=2)
        views, buffers = tuple(parts), (qkv,)
    else:
        q_layout = "bshd" if case.layout.startswith("expanded") else case.layout
        buffers = (
            _lay_out(q, q_layout, case.device),
            _lay_out(k, case.layout, case.device),
            _lay_out(v, case.layout, case.device),
        )
        views = tuple(buffer.view for buffer in buffers)
    dout = _make_dout(case, q_shape, generator).to(case.device)
    dlse = None
    if case.dlse:
        lse_dtype = torch.float64 if case.dtype == "float64" else torch.float32
        dlse = torch.randn(case.batch, case.heads, case.seqlen_q, generator=generator)
        dlse = dlse.to(case.device, lse_dtype)
    return Inputs(*views, dout=dout, dlse=dlse, buffers=buffers)


def on_every_device(cases: Iterable[Case]) -> Sequence[object]:
    """pytest parameters: each case on the CPU and on CUDA."""
    cpu = list(cases)
    # Cases that differ in dtype alone may be the same on CUDA.
    cuda = dict.fromkeys(case.on("cuda") for case in cpu)
    return [
        *(pytest.param(case, id=str(case)) for case in cpu),
        *(pytest.param(case, id=str(case), marks=pytest.mark.gpu) for case in cuda),
    ]


def _values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "constant":
        return torch.full(shape, 0.5, dtype=torch.float64)
    if kind == "one_hot":
        hot = torch.randint(shape[-1], shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(hot, shape[-1]).double()
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return normal
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "sparse":  # four of five are 0, the others small integers: many ties, exact sums
        return torch.round(2 * normal) * (uniform < 0.2)
    if kind == "outlier":
        return torch.where(uniform < 1e-3, 100 * normal, normal)
    if kind == "large":  # scores of about 1e4
        return 100 * normal
    raise ValueError(f"data must be one of {DATA}, got {kind!r}")


def _make_dout(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if case.dout == "zeros":
        return torch.zeros(shape, dtype=case.torch_dtype)
    if case.dout == "expanded":  # what out.sum().backward() passes
        return torch.ones((), dtype=case.torch_dtype).expand(shape)
    values = _values("one_hot" if case.dout == "one_hot" else "normal", shape, generator)
    values = values.to(case.torch_dtype)
    if case.dout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if case.dout == "strided_dim":
        return values.transpose(1, 3).contiguous().transpose(1, 3)
    return values


def _lay_out(values: Tensor, layout: str, device: str) -> Embedded:
    if layout in _ORDERS:
        return embed(values, device, order=_ORDERS[layout])
    if layout == "strided_dim":
        return embed(values, device, gaps=(0, 0, 0, 1))
    if layout == "sliced":
        return embed(values, device, gaps=(7, 5, 3, 0))
    if layout == "offset":
        return embed(values, device, start=1)
    if layout == "expanded_heads":
        return embed(values[:, :, :1], device, expand=values.shape)
    if layout == "expanded_batch":
        return embed(values[:1], device, expand=values.shape)
    if layout == "unit_strides":
        return embed(values, device, unit_stride=3)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
