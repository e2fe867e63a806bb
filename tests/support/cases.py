# SPDX-License-Identifier: BSD-3-Clause
"""A test case: everything that decides the inputs of one attention call, in one frozen value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.support.poison import Embedded, embed
from tests.support.rules import Packing, Rules, draw_rules, lay_out_rule, visibility

# What cases run in on CUDA instead of each dtype: what most kernels are for. float32 there has
# tests of its own (tests/kernels/test_float32.py).
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
    head_dim_v: int | None = None  # None: head_dim
    varlen: bool = False  # are the sequences packed? seqlen_q and seqlen_k are then of the longest
    lengths: str = ""  # which shorter lengths are given; one of rules.LENGTHS
    bias: str | None = None  # the dimensions it has, of "bhqk"; also of mask and block_mask
    bias_dtype: str | None = None  # None: dtype
    bias_data: str = "normal"  # one of rules.BIAS_DATA
    bias_grad: bool = True
    mask: str | None = None
    block_mask: str | None = None
    density: float = 0.7  # of masks: how much of them is True
    padding: str = ""  # one of rules.PADDINGS
    documents: str = ""  # one of rules.DOCUMENTS
    prefix: bool = False
    softcap: float = 0.0
    alibi: str = ""  # the dimensions that the slopes have: "h" or "bh"
    sinks: str = ""  # one of rules.SINKS
    dropout: float = 0.0
    max_logit: bool = False
    rule_layout: str = "plain"  # of all these tensors; one of rules.RULE_LAYOUTS
    tf32: bool = False  # does torch allow it? In float32 on CUDA
    seed: int = 0
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def width_of_values(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def scale(self) -> float:
        default = 1.0 / math.sqrt(self.head_dim)
        return default if self.softmax_scale is None else self.softmax_scale

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def terms_dtype(self) -> torch.dtype:
        """Of slopes and sinks."""
        is_given = self.bias_dtype not in (None, "float64")
        return getattr(torch, self.bias_dtype) if is_given else self.statistics_dtype

    @property
    def mask_arguments(self) -> dict[str, object]:
        return {
            "causal": self.causal,
            "window_size": self.window,
            "softmax_scale": self.softmax_scale,
        }

    def on(self, device: str) -> Case:
        """The same problem on another device, in a dtype that the device takes."""
        if not device.startswith("cuda"):
            return dataclasses.replace(self, device=device)
        bias_dtype = "float32" if self.bias_dtype == "float64" else self.bias_dtype
        dtype = CUDA_DTYPES[self.dtype]
        return dataclasses.replace(self, device=device, dtype=dtype, bias_dtype=bias_dtype)

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
    """What a case is called with, and the gradients of both results.

    The tensors lie in NaN-filled buffers, and rows that do not exist, of any of them, hold NaN.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    buffers: tuple[Embedded, ...]
    bias: Tensor | None = None
    rules: dict[str, Tensor] = field(default_factory=dict)  # arguments of the public function
    visibility: dict[str, Tensor | None] = field(default_factory=dict)  # those of visible_pairs
    terms: dict[str, Tensor] = field(default_factory=dict)  # alibi_slopes and sinks
    packing_q: Packing | None = None
    packing_k: Packing | None = None

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
    k_shape = (case.batch, case.seqlen_k, case.heads_kv, case.head_dim)
    v_shape = (*k_shape[:3], case.width_of_values)
    q, k, v = (
        _values(case.data, shape, generator).to(case.torch_dtype)
        for shape in (q_shape, k_shape, v_shape)
    )
    dout = _dout_values(case, (*q_shape[:3], case.width_of_values), generator)
    dlse = None
    if case.dlse:
        dlse = torch.randn(case.batch, case.heads, case.seqlen_q, generator=generator)
        dlse = dlse.to(case.statistics_dtype)
    rules = draw_rules(case, generator)
    q, dout = (_without_foreign_rows(x, rules.lengths_q, rules.packing_q) for x in (q, dout))
    if dlse is not None:  # (batch, heads, seqlen_q), or packed (heads, total_q)
        dlse = dlse.transpose(1, 2)
        dlse = _without_foreign_rows(dlse, rules.lengths_q, rules.packing_q)
        dlse = dlse.transpose(-2, -1).to(case.device)
    if case.varlen or case.layout != "expanded_batch":  # there, all have the rows of the first
        k, v = (_without_foreign_rows(x, rules.lengths_k, rules.packing_k) for x in (k, v))
    views, buffers = _lay_out_qkv(case, q, k, v)
    return _with_rules(case, rules, Inputs(*views, _lay_out_dout(case, dout), dlse, tuple(buffers)))


def _with_rules(case: Case, rules: Rules, inputs: Inputs) -> Inputs:
    laid_out = {name: lay_out_rule(x, name, case) for name, x in rules.arguments.items()}
    bias = None if rules.bias is None else lay_out_rule(rules.bias, "attn_bias", case)
    arguments = {name: embedded.view for name, embedded in laid_out.items()}
    terms = {name: lay_out_rule(x, name, case) for name, x in rules.terms.items()}
    lengths = (None if x is None else x.to(case.device) for x in (rules.lengths_q, rules.lengths_k))
    return dataclasses.replace(
        inputs,
        bias=None if bias is None else bias.view,
        rules=arguments,
        terms={name: embedded.view for name, embedded in terms.items()},
        visibility=visibility(arguments, *lengths),
        packing_q=rules.packing_q,
        packing_k=rules.packing_k,
        buffers=(
            *inputs.buffers,
            *laid_out.values(),
            *terms.values(),
            *([] if bias is None else [bias]),
        ),
    )


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


def _dout_values(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if case.dout == "zeros":
        return torch.zeros(shape, dtype=case.torch_dtype)
    if case.dout == "expanded":
        return torch.ones(shape, dtype=case.torch_dtype)
    values = _values("one_hot" if case.dout == "one_hot" else "normal", shape, generator)
    return values.to(case.torch_dtype)


def _lay_out_dout(case: Case, dout: Tensor) -> Tensor:
    dout = dout.to(case.device)
    if case.dout == "expanded":  # what out.sum().backward() passes
        return torch.ones((), dtype=dout.dtype, device=case.device).expand(dout.shape)
    if case.dout == "transposed":
        return dout.transpose(-3, -2).contiguous().transpose(-3, -2)
    if case.dout == "strided_dim":
        return dout.transpose(-3, -1).contiguous().transpose(-3, -1)
    return dout


def _without_foreign_rows(x: Tensor, lengths: Tensor | None, packing: Packing | None) -> Tensor:
    """(batch, seqlen, ...), or (total, ...) where it is packed, with NaN in rows of no sequence."""
    if packing is not None:
        return packing.pack(x, math.nan)
    if lengths is None:
        return x
    is_foreign = torch.arange(x.shape[1]) >= lengths[:, None]
    return x.masked_fill(is_foreign.unflatten(1, (-1, *[1] * (x.dim() - 2))), math.nan)


def _lay_out_qkv(case: Case, *tensors: Tensor) -> tuple[Sequence[Tensor], Sequence[Embedded]]:
    """Views of q, k and v, and the buffers around them."""
    q, k, v = (x[None] if case.varlen else x for x in tensors)  # packed: one batch entry
    if case.layout == "packed":
        qkv = embed(torch.cat([q, k, v], dim=2), case.device)
        views = qkv.view.split([case.heads, case.heads_kv, case.heads_kv], dim=2)
        buffers = [qkv]
    else:
        q_layout = "bshd" if case.layout.startswith("expanded") else case.layout
        buffers = [
            _lay_out(q, q_layout, case.device),
            _lay_out(k, case.layout, case.device),
            _lay_out(v, case.layout, case.device),
        ]
        views = [buffer.view for buffer in buffers]
    return [view[0] if case.varlen else view for view in views], buffers


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
