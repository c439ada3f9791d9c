"""What is written, and killed, while training goes on, in every layout; against saves that are waited for."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    Forked,
    arguments,
    exit_codes,
    exit_record,
    metrics,
    num_steps,
    start_ranks,
    wait_until,
    write_corpus,
)

pytestmark = [pytest.mark.slow, pytest.mark.dist]

STEPS = 4
EVERY_SECOND = {"run__steps": STEPS, "checkpoint__interval": 2, "checkpoint__keep": 9, "run__micro_batch_size": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


def _train(args: list[str], world_size: int) -> list[Forked]:
    return start_ranks([args] * world_size) if world_size > 1 else [Forked(args)]


def _checkpoints(run_dir: Path) -> dict[str, Any]:
    """Of every step: hashes of its files and the state of its manifest."""
    found = {}
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        manifest = json.loads((path / "MANIFEST.json").read_text())
        state = {key: value for key, value in manifest["train_state"].items() if key != "wandb_id"}
        found[path.name] = ([file["xxh3_128"] for file in manifest["files"]], manifest["kinds"], state)
    return found


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {"optimizer__moments_dtype": "bf16"}),
        (1, {"parallel__offload_optimizer": "cpu"}),
        (2, {"parallel__zero_stage": 1, "parallel__expert_parallel_size": 2}),
        (2, {"parallel__zero_stage": 2, "parallel__context_parallel_size": 2}),
        (2, {"parallel__zero_stage": 3}),
    ],
    ids=["bf16-moments", "offload", "z1-ep2", "z2-cp2", "z3"],
)
def test_checkpoints_hold_their_step_bit_for_bit(
    corpus: Path, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    runs = {}
    for async_save in ("false", "true"):
        run_dir = tmp_path / async_save
        args = arguments(corpus, run_dir, **EVERY_SECOND, **layout, checkpoint__async_save=async_save)
        assert exit_codes(_train(args, world_size)) == [0] * world_size
        runs[async_save] = (_checkpoints(run_dir), metrics(run_dir))
    assert list(runs["true"][0]) == [f"step_{step:08d}" for step in range(2, STEPS + 1, 2)]
    assert runs["true"] == runs["false"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_while_a_checkpoint_is_written_cost_only_that(corpus: Path, tmp_path: Path, world_size: int) -> None:
    common = {**EVERY_SECOND, "checkpoint__interval": 1, "checkpoint__keep": 5, "run__steps": 9}
    whole = tmp_path / "whole"
    assert exit_codes(_train(arguments(corpus, whole, **common), world_size)) == [0] * world_size
    run_dir = tmp_path / "killed"
    args = arguments(corpus, run_dir, **common)
    delays = random.Random(world_size)
    for attempt in range(2):
        ranks = _train(args, world_size)
        wait_until(lambda attempt=attempt: num_steps(run_dir) >= 2 + 3 * attempt, "the next steps")
        time.sleep(delays.random() * 0.1)
        for rank in ranks:
            rank.kill()
        exit_codes(ranks)
    assert exit_codes(_train(args, world_size)) == [0] * world_size
    assert metrics(run_dir) == metrics(whole)
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step_{step:08d}" for step in range(5, 10))}
    assert _checkpoints(run_dir) == _checkpoints(whole)


def test_a_rank_lost_while_a_checkpoint_is_written_is_named(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(corpus, run_dir, **{**EVERY_SECOND, "run__steps": 100_000, "checkpoint__interval": 1})
    ranks = _train(args, 2)
    wait_until(lambda: num_steps(run_dir) >= 3, "step 3")
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert exit_codes(ranks) == [-9, 69]
    assert exit_record(run_dir)["reason"].startswith(f"rank 1: rank 0 (process {ranks[0].pid} on ")
