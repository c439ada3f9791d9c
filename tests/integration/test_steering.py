"""Runs that are extended, moved to other data, re-batched, taken back and forked, against rates and rows by hand."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    Forked,
    arguments,
    metrics,
    num_steps,
    run_forked,
    wait_until,
    write_corpus,
)

pytestmark = pytest.mark.slow

COSINE: dict[str, Any] = {
    "schedule__kind": "cosine",
    "schedule__min_lr": "1e-4",
    "optimizer__lr": "1e-3",
    "run__precision": "fp32",
    "checkpoint__interval": 2,
    "checkpoint__keep": 9,
}
CHANGED: dict[str, Any] = {
    "run__steps": 10,
    "optimizer__lr": "5e-4",
    "run__global_batch_size": 2,
    "data__sequence_length": 32,
    "schedule__rewarmup_steps": 3,
    "schedule__rewarmup_from": "zero",
    "checkpoint__interval": 1,
}
ACCEPT = ("--resume.accept", "run.steps,optimizer.lr,run.global_batch_size,data.sequence_length,data.sources")


def cosine(step: int, *, peak: float, end: int) -> float:
    """The schedule with 2 steps of warm-up and ``min_lr`` 1e-4."""
    return 1e-4 + (peak - 1e-4) * 0.5 * (1 + math.cos(math.pi * (step - 2) / (end - 2)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "other"
    folder.mkdir()
    (folder / "text.txt").write_text("".join(f"line {number} of another text\n" for number in range(2000)))
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of cosine, finished."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    done = run_forked(arguments(corpus, run_dir, run__steps=6, **COSINE))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def extended(corpus: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, extended to 8 steps."""
    run_dir = shutil.copytree(finished, tmp_path_factory.mktemp("extended") / "run")
    args = arguments(corpus, run_dir, run__steps=8, **COSINE)
    refused = run_forked(args)
    assert (refused.returncode, refused.stderr.splitlines()) == (
        2,
        [
            f"run.steps: was 6, now 8: {run_dir} belongs to another configuration; go on with the change by "
            "--resume.accept run.steps, or choose another run.dir"
        ],
    )
    done = run_forked([*args, "--resume.accept", "run.steps"])
    assert done.returncode == 0, done.stderr
    return run_dir


def test_an_extended_cosine_run_follows_the_longer_cosine(finished: Path, extended: Path) -> None:
    rates = [row["optim/lr"] for row in metrics(extended)]
    before = [0.5e-3, 1e-3, *(cosine(step, peak=1e-3, end=6) for step in (3, 4, 5, 6))]
    assert rates == pytest.approx([*before, cosine(7, peak=1e-3, end=8), cosine(8, peak=1e-3, end=8)], rel=1e-12)
    assert [row["tokens"] for row in metrics(extended)] == [256 * step for step in range(1, 9)]
    assert metrics(extended)[:6] == metrics(finished)
    change = {"key": "run.steps", "old": 6, "new": 8, "step": 6}
    assert json.loads((extended / "run.json").read_text())["changes"] == [change]
    manifest = json.loads((extended / "checkpoints" / "step_00000008" / "MANIFEST.json").read_text())
    assert manifest["train_state"]["changes"] == [change]


def test_everything_changed_at_once_goes_on_exactly_after_a_kill(
    corpus: Path, other: Path, finished: Path, tmp_path: Path
) -> None:
    mixed = f"[{{source: {corpus}, weight: 1}}, {{source: {other}, weight: 3}}]"
    changes = {**COSINE, **CHANGED, "data__sources": mixed}
    whole, killed = (shutil.copytree(finished, tmp_path / name / "run") for name in ("whole", "killed"))
    done = run_forked([*arguments(corpus, whole, **changes), *ACCEPT])
    assert done.returncode == 0, done.stderr
    args = [*arguments(corpus, killed, **changes), *ACCEPT]
    process = Forked(args)
    wait_until(lambda: num_steps(killed) >= 8, "two steps behind the change")
    time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert metrics(killed) == metrics(whole)

    rows = metrics(whole)
    scheduled = {step: cosine(step, peak=5e-4, end=10) for step in range(7, 11)}
    by_hand = [scheduled[7] / 3, scheduled[8] * 2 / 3, scheduled[9], scheduled[10]]
    assert [row["optim/lr"] for row in rows[6:]] == pytest.approx(by_hand, rel=1e-12)
    assert [row["tokens"] for row in rows[5:]] == [6 * 256 + 64 * step for step in range(5)]
    state = json.loads((whole / "checkpoints" / "step_00000010" / "MANIFEST.json").read_text())["train_state"]
    # 24 rows of 64 tokens were taken of the corpus; in rows of 32 it goes on with its second epoch.
    corpus_rows = (json.loads((whole / "run.json").read_text())["data"][0]["tokens"] - 32) // 32
    assert [(source["order"], source["first_row"]) for source in state["sources"]] == [(0, corpus_rows), (1, 0)]
    assert state["consumed_samples"] == 4 * 2
    assert state["rewarmup"] == {"after_step": 6, "from_lr": 0.0, "steps": 3}
    assert {change["key"] for change in state["changes"]} == set(ACCEPT[1].split(","))


def test_a_run_goes_back_once_and_keeps_what_came_after(corpus: Path, extended: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(extended, tmp_path / "run")
    args = [
        *arguments(corpus, run_dir, run__steps=6, **(COSINE | {"optimizer__lr": "5e-4"})),
        *("--resume.from", "4", "--resume.accept", "run.steps,optimizer.lr"),
    ]
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:4] == metrics(extended)[:4]
    assert [row["optim/lr"] for row in rows[4:]] == pytest.approx([cosine(step, peak=5e-4, end=6) for step in (5, 6)])
    assert sorted(path.name for path in (run_dir / "checkpoints" / "aside-1").iterdir()) == [
        "step_00000006",
        "step_00000008",
    ]
    aside = (run_dir / "metrics.jsonl.aside-1").read_text()
    assert aside == (extended / "metrics.jsonl").read_text()
    again = run_forked(args)
    assert again.returncode == 0, again.stderr
    assert "an earlier attempt with this configuration went back there" in again.stderr
    assert metrics(run_dir) == rows


def test_a_run_forked_with_optimizer_and_step_equals_the_extended_one(
    corpus: Path, finished: Path, extended: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "fork"
    args = [
        *arguments(corpus, run_dir, run__steps=8, **COSINE),
        *("--resume.from", str(finished), "--resume.accept", "run.steps"),
    ]
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert "rows lost" not in done.stderr
    assert metrics(run_dir) == metrics(extended)[6:]
    again = run_forked(args)
    assert again.returncode == 0, again.stderr
    assert "--resume.from is not read: run.dir has a checkpoint" in again.stderr


def test_a_growing_batch_goes_on_exactly_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    growing = {**COSINE, "run__steps": 8, "schedule__rampup_batch_size": "[1, 1, 9]", "checkpoint__interval": 1}
    growing["run__micro_batch_size"] = 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_forked(arguments(corpus, whole, **growing))
    assert done.returncode == 0, done.stderr
    process = Forked(arguments(corpus, killed, **growing))
    wait_until(lambda: num_steps(killed) >= 4, "a step of two rows")
    process.kill()
    process.communicate(timeout=60)
    done = run_forked(arguments(corpus, killed, **growing))
    assert done.returncode == 0, done.stderr
    assert metrics(killed) == metrics(whole)
    # From 1 to 4 rows in three increments, one every 3 samples.
    sizes = [1, 1, 1, 2, 2, 3, 4, 4]
    assert [row["tokens"] for row in metrics(whole)] == [64 * sum(sizes[:step]) for step in range(1, 9)]
