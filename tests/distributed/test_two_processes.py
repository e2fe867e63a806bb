# SPDX-License-Identifier: BSD-3-Clause
"""Two processes compute what one does: training (data parallel, sharded, tensor parallel), and
attention of DTensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


@pytest.mark.parametrize("script", ["train.py", "dtensors.py"])
def test_two_processes_agree_with_one(device: str, script: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    result = subprocess.run(
        [sys.executable, *LAUNCH, str(FOLDER / script), "--device", device],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
