"""Model states against what DeepSpeed really allocates, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, ("fp32", "1", "fp32", "none", "1")),
        (2, ("bf16", "1", "bf16", "none", "2")),
        (2, ("bf16", "2", "fp32", "none", "1")),
        (2, ("bf16", "1", "fp32", "cpu", "1")),
        (2, ("bf16", "2", "bf16", "cpu", "1")),
        (2, ("bf16", "3", "fp32", "none", "2")),
        (2, ("fp32", "3", "fp32", "none", "1")),
    ],
    ids=lambda settings: "-".join(settings) if isinstance(settings, tuple) else str(settings),
)
def test_states_are_what_deepspeed_allocates(processes: int, settings: tuple[str, ...]) -> None:
    """Weights, accumulated gradients in the middle of a step, master and moments after it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = ["-m", "tests.unit.accounting.allocated_worker", *settings]
    done = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert report["allocated"] == report["counted"]
