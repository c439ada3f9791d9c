"""A rank that is killed under NCCL, whose kernels wait for it on the others' GPUs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.integration.gpu_curves import ON_CUDA
from tests.integration.launching import (
    arguments,
    exit_record,
    num_steps,
    processes_of,
    start,
    wait_until,
    workers_of,
    write_corpus,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_killed_rank_is_named_and_nothing_stays_behind(tmp_path: Path) -> None:
    num_gpus = min(4, torch.cuda.device_count())
    if num_gpus < 2:
        pytest.skip("needs 2 GPUs")
    run_dir = tmp_path / "run"
    settings = {"run__steps": 100_000, "run__peer_timeout_s": 25, "parallel__expert_parallel_size": num_gpus}
    args = arguments(write_corpus(tmp_path), run_dir, **ON_CUDA, **settings)
    process = start("console", ["--nproc-per-node", str(num_gpus), *args])
    wait_until(lambda: num_steps(run_dir) >= 5, "step 5")
    victim = workers_of(run_dir)[num_gpus - 1]
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 69, stderr
    assert processes_of(run_dir) == []
    record = exit_record(run_dir)
    assert record["code"] == 69
    assert f"rank {num_gpus - 1} (process {victim}" in record["reason"]
