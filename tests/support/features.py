# SPDX-License-Identifier: BSD-3-Clause
"""What attention does beside full attention of equal heads, and which of it meets in the tests."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flash_attn_cuda.introspect import RULES
from tests.support.cases import Case


@dataclass(frozen=True)
class Feature:
    name: str
    asked_for_by: str  # arguments in backquotes, as the README shows them
    is_in: Callable[[Case], bool]

    def runs(self, row: dict[str, Any]) -> bool:
        """Whether this row of the kernel table does it."""
        arguments = set(re.findall(r"`(\w+)`", self.asked_for_by))
        if "window_size" in arguments and row["mask"] != "window":
            return False
        if "softcap" in arguments and not row["softcap"]:
            return False
        return row["score"] != "plain" or not arguments & set(RULES)


FEATURES = (
    Feature(
        "causal, sliding windows",
        "`causal`, `window_size`",
        lambda case: case.causal or case.window != (-1, -1),
    ),
    Feature("GQA, MQA", "fewer heads of k and v", lambda case: case.heads_kv != case.heads),
    Feature(
        "head_dim_v",
        "another last dimension of v",
        lambda case: case.width_of_values != case.head_dim,
    ),
    Feature("packed sequences", "`cu_seqlens_q`, `cu_seqlens_k`", lambda case: case.varlen),
    Feature(
        "lengths",
        "`seqlens_q`, `seqlens_k`; packed: `seqused_q`, `seqused_k`",
        lambda case: case.lengths != "",
    ),
    Feature(
        "bias with a gradient", "`attn_bias`", lambda case: case.bias is not None and case.bias_grad
    ),
    Feature("mask", "`attn_mask`", lambda case: case.mask is not None),
    Feature("block mask", "`block_mask`", lambda case: case.block_mask is not None),
    Feature("padding of keys", "`key_padding_mask`", lambda case: case.padding != ""),
    Feature("documents", "`document_ids`", lambda case: case.documents != ""),
    Feature("prefix-LM", "`prefix_lens`", lambda case: case.prefix),
    Feature("softcap", "`softcap`", lambda case: case.softcap != 0.0),
    Feature("ALiBi with a gradient", "`alibi_slopes`", lambda case: case.alibi != ""),
    Feature("sinks with a gradient", "`sinks`", lambda case: case.sinks != ""),
    Feature("dropout", "`dropout_p`", lambda case: case.dropout != 0.0),
    Feature("the largest score", "`return_max_logit`", lambda case: case.max_logit),
    Feature("gradient of the LSE", "`return_lse`", lambda case: case.dlse),
    Feature("deterministic gradients", "`deterministic`", lambda case: case.deterministic),
)


def pairs_in_none(cases: Iterable[Case]) -> list[tuple[Feature, Feature]]:
    """Every two features that no case has together."""
    missing = dict.fromkeys(itertools.combinations(FEATURES, 2))
    for case in cases:
        present = [feature for feature in FEATURES if feature.is_in(case)]
        for pair in itertools.combinations(present, 2):
            missing.pop(pair, None)
    return list(missing)
