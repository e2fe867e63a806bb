# SPDX-License-Identifier: BSD-3-Clause
"""Trains GPT-2 small in HuggingFace's own code with each attention, and writes CSV.

python benchmarks/huggingface.py --out figures
python benchmarks/huggingface.py --dropout 0 --seqlens 1024 --attention sdpa fa_cuda
python benchmarks/huggingface.py --device cpu --layers 1 --width 64 --seqlens 64 --tokens 256

The model is transformers' GPT2LMHeadModel from its own configuration, with random weights, fused
AdamW and, on a GPU, bfloat16 autocast. Only attn_implementation differs: eager and sdpa are
transformers' own, fa_cuda is ours. "compiled" rows run the model through torch.compile as it is.

Columns: median time of a step without the first --warmup ones, thousand tokens per second of it,
peak memory (all that torch allocated), and the loss of the first and of the last step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench
import torch
import transformers
from timing import driver_version, lap_times
from torch import Tensor
from tqdm import tqdm
from training import table, writer

from flash_attn_cuda import hf

RESULTS = ("step_ms", "ktokens_per_s", "peak_gib", "first_loss", "last_loss")
NAMED = ("suite", "seqlen", "batch", "attention", "compiled", "dropout", "status", "steps")
COLUMNS = (
    *NAMED,
    *RESULTS,
    *("parameters", "transformers", "gpu", "driver", "torch", "cuda", "version", "commit"),
)
PRINTED = ("seqlen", "attention", "compiled", "dropout", "status", *RESULTS)
HEAD_DIM = 64
# Without warm-up and clipping, which say nothing of speed, more makes the loss leap.
LEARNING_RATE = 1e-4

Row = dict[str, object]


def make_model(attention: str, seqlen: int, options: argparse.Namespace) -> Any:
    heads = options.width // HEAD_DIM
    config = transformers.GPT2Config(
        n_positions=seqlen, n_layer=options.layers, n_embd=options.width, n_head=heads
    )
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = options.dropout
    torch.manual_seed(0)
    with torch.device(options.device):
        return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def train(attention: str, compiled: bool, seqlen: int, options: argparse.Namespace) -> Row:
    """What is measured of one run."""
    model = make_model(attention, seqlen, options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    forward = torch.compile(model) if compiled else model
    generator = torch.Generator().manual_seed(1)
    shape = (options.tokens // seqlen, seqlen)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(options.device)

    def step() -> Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss: Tensor = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    count = options.warmup + options.steps
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    name = f"{seqlen} {attention}{' compiled' if compiled else ''}"
    steps = tqdm((step() for _ in range(count)), name, count)
    losses, times = lap_times(steps, options.device)
    step_ms = statistics.median(times[options.warmup :])
    measured: Row = {
        "status": "ok",
        "step_ms": f"{step_ms:.5g}",
        "ktokens_per_s": f"{options.tokens / step_ms:.4g}",
        "first_loss": f"{losses[0].item():.4f}",
        "last_loss": f"{losses[-1].item():.4f}",
        "parameters": sum(weights.numel() for weights in model.parameters()),
    }
    if options.device == "cuda":
        measured["peak_gib"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    return measured


def measure(attention: str, compiled: bool, seqlen: int, options: argparse.Namespace) -> Row:
    try:
        return train(attention, compiled, seqlen, options)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except Exception as error:
        return {"status": bench.reason(error, [])}
    finally:
        torch.compiler.reset()
        gc.collect()  # what a run leaves may refer to itself
        if options.device == "cuda":
            torch.cuda.empty_cache()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ["eager", "sdpa", hf.NAME]
    add("--attention", nargs="+", choices=names, default=names, help=" ".join(names))
    modes = {"no": [False], "only": [True], "both": [False, True]}
    add("--compiled", choices=modes, default="both", help="through torch.compile; default: both")
    add("--seqlens", type=int, nargs="+", default=[1024, 4096], help="default: 1024 4096")
    add("--tokens", type=int, default=16384, help="of a step, batch * seqlen; default: 16384")
    add("--dropout", type=float, default=0.1, help="of all kinds; default: GPT-2's own 0.1")
    add("--steps", type=int, default=20, help="default: 20")
    add("--warmup", type=int, default=5, help="steps before; default: 5")
    add("--layers", type=int, default=12, help="default: 12")
    add("--width", type=int, default=768, help=f"heads * {HEAD_DIM}; default: 768")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda, else cpu")
    add("--out", type=Path, default=Path(), help="folder; default: this one")
    add("--commit", help="what to write as commit; default: what git says")
    options = parser.parse_args(arguments)
    if any(options.tokens % seqlen for seqlen in options.seqlens):
        parser.error(f"--tokens {options.tokens} is no multiple of every seqlen")
    options.compiled = modes[options.compiled]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    hf.register()
    driver = driver_version() if options.device == "cuda" else ""
    constants: Row = bench.environment(options) | {"suite": "huggingface", "driver": driver}
    constants |= {"transformers": transformers.__version__, "dropout": options.dropout}
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        summary = writer(stack, options.out / "huggingface.csv", COLUMNS)
        for seqlen in options.seqlens:
            for compiled in options.compiled:
                for attention in options.attention:
                    run: Row = {"seqlen": seqlen, "batch": options.tokens // seqlen}
                    run |= {"attention": attention, "compiled": compiled, "steps": options.steps}
                    rows.append(run | constants | measure(attention, compiled, seqlen, options))
                    summary.writerow(rows[-1])
    print(table(rows, PRINTED))


if __name__ == "__main__":
    main()
