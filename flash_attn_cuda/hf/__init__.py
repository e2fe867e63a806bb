# SPDX-License-Identifier: BSD-3-Clause
"""HuggingFace transformers models on these kernels, by the name "fa_cuda".

For models to come::

    from flash_attn_cuda import hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fa_cuda")

For a model that exists::

    report = hf.patch_hf_model(model)
    hf.unpatch_hf_model(model)

Padding on either side, packed sequences, sliding windows, caches of any kind, softcap, sinks and
biases with their gradients run in the kernels. Patterns of other kinds (Llama 4's chunks, windows
to both sides, blocks of an image, a user's own), patterns that a model's layers do not know by
themselves, and masks that models make, come as a mask of all pairs, which takes as much memory as
it does in transformers. output_attentions=True raises, for nobody holds the probabilities, and so
do models that compute attention without asking for an implementation.

Rows of padding hold 0 where no key is before them, and else what eager attention makes of keys that
exist. Positions that begin again in a row without a mask, or with a full one, are those of packed
sequences, as they are to FlashAttention in transformers; to eager attention only without a cache.
Models that share a configuration are patched together.

transformers 4.53 or newer is needed. What older versions lack:

- Before 5.15 T5, before 5.7 ModernBERT and before 5.0 BERT ask for no implementation and cannot be
  patched; others fail when they are made, with a KeyError that names fa_cuda.
- Before 5.1 GPT-2 tells its attention where packed sequences begin only without a cache, and in
  4.53 not at all; like eager attention, ours then takes them for one.
- Before 5.0 BART, and in 4.53 GPT-2, make masks of all pairs by themselves.

Under torch.compile nobody can look at positions: those of a batch of one row may tell of packed
sequences; those of more rows, or beside a mask, are taken for one each. Before torch 2.14 a
compiled window is a mask of all pairs. Importing this module changes nothing.
"""

from __future__ import annotations

# First: what it says of a transformers that is too old comes before what others would.
from flash_attn_cuda.hf import _versions  # noqa: F401

# isort: split
from flash_attn_cuda.hf._patch import (
    NAME,
    PatchReport,
    patch_hf_model,
    register,
    unpatch_hf_model,
)

__all__ = ["NAME", "PatchReport", "patch_hf_model", "register", "unpatch_hf_model"]
