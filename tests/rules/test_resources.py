# SPDX-License-Identifier: BSD-3-Clause
"""No kernel spills or takes more shared memory than its row says: the driver's own account of
every row on the GPU at hand.

Without a GPU, `make kernels` says the same from the compiler's report.
"""

from __future__ import annotations

import pytest

from flash_attn_cuda import _C


@pytest.mark.gpu
def test_resources_are_those_of_the_table() -> None:
    rows = {row["name"]: row for row in _C.kernel_table() if row["family"] != "cpu"}
    resources = _C.kernel_resources()
    assert set(resources) == {name for name, row in rows.items() if row["built"]}
    for name, used in resources.items():
        assert used["local_bytes"] == 0, name
        assert used["dynamic_smem_bytes"] == rows[name]["smem_bytes"], name
        assert used["static_smem_bytes"] == 0, f"{name}: not in smem_bytes"
