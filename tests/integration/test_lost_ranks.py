"""A rank that is killed or stops answering: the other one says so and ends, nothing stays behind, nothing is lost."""

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    TWO_RANKS,
    Forked,
    arguments,
    exit_codes,
    exit_record,
    metrics,
    num_steps,
    processes_of,
    start,
    start_ranks,
    wait_until,
    workers_of,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _start(form: str, args: list[str]) -> subprocess.Popen[str] | Forked:
    """Launchers are forked, what they start is not."""
    if form == "own launcher":
        return Forked(["--nproc-per-node", "2", *args])
    return start("module", args, num_processes=2)


def _is_saving(run_dir: Path) -> bool:
    return any(path.name.startswith(".tmp-step_") for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("form", "rank", "moment", "code"),
    [("torchrun", 1, "step", 1), ("own launcher", 0, "save", 69)],
)
def test_killed_rank_is_named_and_the_same_line_goes_on(
    tmp_path: Path,
    shared_corpus: Path,
    two_ranks: list[dict[str, Any]],
    form: str,
    rank: int,
    moment: str,
    code: int,
) -> None:
    run_dir = tmp_path / "run"
    # What is saved beside training may not be there yet, steps later.
    beside = {"checkpoint__async_save": moment == "save"}
    args = arguments(shared_corpus, run_dir, **TWO_RANKS, **beside, checkpoint__interval=1 if moment == "save" else 3)
    process = _start(form, args)
    wait_until(lambda: num_steps(run_dir) >= 5, "step 5")
    victim = workers_of(run_dir)[rank]
    if moment == "save":
        wait_until(lambda: _is_saving(run_dir), "a checkpoint that is being written", poll_s=0.001)
    os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == code, stderr
    assert processes_of(run_dir) == []

    outcome = exit_record(run_dir)
    assert (outcome["code"], outcome["rank"]) == (69, 1 - rank)
    where = f"rank {rank} (process {victim} on {socket.gethostname()}) has died: "
    assert outcome["reason"].startswith(f"rank {1 - rank}: {where}")
    collectives = run_dir / f"flight_recorder_rank_{1 - rank}"
    assert outcome["reason"].endswith(f"; its last collectives: {collectives}")
    assert collectives.stat().st_size > 0
    assert outcome["reason"] in stderr

    again = start_ranks([args, args])
    assert exit_codes(again) == [0, 0]
    assert "resumed from step" in again[0].communicate()[1]
    assert metrics(run_dir) == two_ranks


@pytest.mark.parametrize(
    "shared",
    [{"parallel__context_parallel_size": 2}, {"parallel__tensor_parallel_size": 2, "model__linear_num_key_heads": 2}],
    ids=["slices", "heads"],
)
def test_killed_rank_of_a_group_that_shares_rows_is_named(
    tmp_path: Path, shared_corpus: Path, shared: dict[str, int]
) -> None:
    """The others wait for heads, states or tokens of it, not for gradients."""
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir, run__steps=100_000, **shared)
    ranks = start_ranks([args, args])
    wait_until(lambda: num_steps(run_dir) >= 2, "step 2")
    ranks[1].kill()
    assert exit_codes(ranks) == [69, -signal.SIGKILL]
    reason = exit_record(run_dir)["reason"]
    assert reason.startswith(f"rank 0: rank 1 (process {ranks[1].pid} on {socket.gethostname()}) has died: ")


def test_rank_that_does_not_answer_counts_as_lost(tmp_path: Path, shared_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir, run__steps=100_000, run__peer_timeout_s=10)
    ranks = start_ranks([args, args])
    wait_until(lambda: num_steps(run_dir) >= 2, "step 2")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    _, stderr = ranks[0].communicate(timeout=200)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 69, stderr
    assert exit_record(run_dir)["code"] == 69
    where = f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) is stopped: "
    assert exit_record(run_dir)["reason"].startswith(f"rank 0: {where}")
    assert "Traceback" not in stderr


def test_ranks_with_different_settings_are_refused_alike(tmp_path: Path, shared_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir)
    ranks = start_ranks([args, [*args, "--run.seed", "7", "--optimizer.lr", "1"]])
    ends = [(*rank.communicate(timeout=200), rank.returncode) for rank in ranks]
    assert [code for *_, code in ends] == [2, 2], ends
    line = (
        "run.seed: not the same on all ranks: 1234 on rank 0, 7 on rank 1 (and 1 more); "
        "start every rank with the same configuration and options"
    )
    printed = "".join(stderr for _, stderr, _ in ends).splitlines()
    # Once, by whichever rank was first.
    assert [text.removeprefix("[rank 1] ") for text in printed] == [line]
    assert (exit_record(run_dir)["code"], exit_record(run_dir)["reason"]) == (2, line)
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "exit.json", "log.txt"]
