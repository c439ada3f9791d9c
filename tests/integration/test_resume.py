"""Stops, kills and resumes against the uninterrupted run, bit for bit (CPU, fp32)."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.integration.launching import (
    Forked,
    arguments,
    exit_codes,
    exit_record,
    metrics,
    run_forked,
    start_ranks,
    workers_of,
    write_corpus,
)

pytestmark = pytest.mark.slow

STEPS = 14


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = run_forked(arguments(corpus, run_dir, run__steps=STEPS, checkpoint__interval=3))
    assert done.returncode == 0, done.stderr
    return metrics(run_dir)


def _wait_for_steps(run_dir: Path, count: int) -> None:
    path = run_dir / "metrics.jsonl"
    while not path.is_file() or path.read_text().count("\n") < count:
        time.sleep(0.02)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, uninterrupted: list[dict[str, float]], stop_signal: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(corpus, run_dir, run__steps=STEPS, checkpoint__interval=3)
    process = Forked(args)
    _wait_for_steps(run_dir, 4)
    process.send_signal(stop_signal)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert exit_record(run_dir)["code"] == 75
    stopped_at = metrics(run_dir)[-1]["step"]
    assert stopped_at < STEPS
    assert (run_dir / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert metrics(run_dir) == uninterrupted
    # The rate of an attempt is known only with the rows of those before it.
    assert f"{STEPS} of {STEPS}, {STEPS - stopped_at:.0f} of them in this attempt" in done.stderr
    assert "tok/s on average" in done.stderr


def test_run_killed_at_random_moments_equals_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, uninterrupted: list[dict[str, float]]
) -> None:
    run_dir = tmp_path / "run"
    # Saving every step makes most kills fall into a save.
    args = arguments(corpus, run_dir, run__steps=STEPS, checkpoint__interval=1)
    delays = random.Random(20260101)
    for attempt in range(4):
        process = Forked(args)
        done_before = len(metrics(run_dir)) if (run_dir / "metrics.jsonl").is_file() else 0
        _wait_for_steps(run_dir, min(done_before + 1 + attempt % 2, STEPS - 1))
        time.sleep(delays.random() * 0.3)
        process.kill()
        process.communicate(timeout=60)
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert metrics(run_dir) == uninterrupted


def test_two_ranks_stop_together_when_one_is_signalled(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(corpus, run_dir, run__steps=STEPS, checkpoint__interval=0)
    ranks = start_ranks([args, args])
    _wait_for_steps(run_dir, 3)
    ranks[1].send_signal(signal.SIGTERM)
    assert exit_codes(ranks) == [75, 75]
    assert exit_record(run_dir)["code"] == 75
    stopped_at = metrics(run_dir)[-1]["step"]
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{stopped_at:08d}"]
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))


def test_own_launcher_ends_quietly_and_a_second_start_meanwhile_leaves_no_trace(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = ["--nproc-per-node", "2", *arguments(corpus, run_dir, run__steps=100_000)]
    first = Forked(args)
    _wait_for_steps(run_dir, 1)
    # It holds its directory meanwhile without taking the cores.
    workers = list(workers_of(run_dir).values())
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    second = run_forked(args[2:])
    assert second.returncode == 2
    assert "is in use by process" in second.stderr
    second = run_forked(["--nproc-per-node", "1", *args[2:]])
    assert second.returncode == 2
    assert "is in use by process" in second.stderr
    assert not (run_dir / "exit.json").exists()
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate(timeout=120)
    assert (first.returncode, exit_record(run_dir)["code"]) == (75, 75)
    assert exit_record(run_dir)["step"] == metrics(run_dir)[-1]["step"]
    assert "Traceback" not in stderr
    assert stderr.rstrip().endswith("; run the same line to go on")
