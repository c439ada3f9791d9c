"""Tokens travel to their experts and back without loss, however uneven the routing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3next_train.parallel.expert_parallel import _without_repeats
from tests.integration.launching import REPOSITORY, environment


def test_a_token_goes_once_to_each_rank() -> None:
    ranks = torch.tensor([[3, 0, 3, 3], [1, 1, 1, 1], [0, 1, 2, 3]])
    assert _without_repeats(ranks).tolist() == [[3, 0, -1, -1], [1, -1, -1, -1], [0, 1, 2, 3]]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_on_other_ranks_compute_the_same(tmp_path: Path, world_size: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.distributed.dispatch_worker", str(tmp_path / "errors.json")],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == 5
    for routing, error in errors.items():
        assert error < 1e-12, routing
