"""Model states against what DeepSpeed really allocates, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("processes", "precision", "stage"), [(1, "fp32", 1), (2, "bf16", 1), (2, "bf16", 2)])
def test_states_are_what_deepspeed_allocates(processes: int, precision: str, stage: int) -> None:
    """Weights, accumulated gradients in the middle of a step, master and moments after it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = ["-m", "tests.unit.accounting.allocated_worker", precision, str(stage)]
    done = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert report["allocated"] == report["counted"]
