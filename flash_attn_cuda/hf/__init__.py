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
biases with their gradients run in the kernels. transformers 4.53 or newer is needed; importing this
module changes nothing.
"""

from __future__ import annotations

from flash_attn_cuda.hf._patch import (
    NAME,
    PatchReport,
    patch_hf_model,
    register,
    unpatch_hf_model,
)

__all__ = ["NAME", "PatchReport", "patch_hf_model", "register", "unpatch_hf_model"]
