"""What the loop does around a save, and at the end of a run that diverges; the engine is a list of outcomes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qwen3next_train.config.schema import LoggingConfig
from qwen3next_train.errors import DivergedError, StorageError
from qwen3next_train.train import loop
from qwen3next_train.train.loop import train
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.checkpoint.support import (
    HookedFilesystem,
    ThreadControl,
    collected_log,
    names,
    on_ranks,
)
from tests.unit.train.loop_runs import Full, FullSink, ScriptedEngine, run_of, steps


def test_divergence_leaves_the_last_good_state_and_names_it(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train(run_of(tmp_path, "...xxx"))
    good = tmp_path / "checkpoints" / "step_00000003"
    assert str(caught.value) == (
        "step 6: gradients were not finite for 3 steps in a row (run.max_skipped_steps); go back to the last good "
        "checkpoint, or an older one, with a lower optimizer.lr than 0.0003: "
        "--resume.from 3 --optimizer.lr LOWER --resume.accept optimizer.lr"
    )
    assert good.is_dir()
    assert steps(tmp_path) == [3, 4, 5]


def test_divergence_from_the_start_has_no_checkpoint_to_name(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"there is no checkpoint from before: choose another run\.dir and a lower"):
        train(run_of(tmp_path, "xxx"))


def test_a_recovered_run_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    run = run_of(tmp_path, "..x.xx..", keep=2)
    assert train(run) is None
    assert steps(tmp_path) == [7, 8]
    assert (run.state.skipped_steps, run.state.consecutive_skips) == (3, 0)


def test_a_resume_goes_on_counting(tmp_path: Path) -> None:
    first = run_of(tmp_path, ".xx", interval=3)
    assert train(first) is None
    found = first.checkpoints.find_latest()
    assert found is not None
    assert found.manifest.train_state.consecutive_skips == 2
    second = run_of(tmp_path, "x.", start=3)
    second.state = found.manifest.train_state
    with pytest.raises(DivergedError, match="step 4: gradients were not finite for 3 steps in a row"):
        train(second)


def test_weights_that_are_not_finite_end_with_the_same_advice(tmp_path: Path) -> None:
    run = run_of(tmp_path, "....", interval=2)
    engine = cast(ScriptedEngine, run.engine)
    run.progress = lambda step: setattr(engine, "fragments_are_finite", step < 3)
    with pytest.raises(DivergedError, match=r"is not finite in elements .*; go back to .*--resume.from 2 "):
        train(run)
    assert steps(tmp_path) == [2]


def test_failed_saves_are_made_good_until_there_are_too_many(tmp_path: Path) -> None:
    disk = Full()
    run = run_of(tmp_path, "....", filesystem=disk, max_failures=4)
    run.progress = lambda step: setattr(disk, "full", step < 3)
    with collected_log() as lines:
        assert train(run) is None
    assert len(lines) == 2
    assert steps(tmp_path) == [4]
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match="No space left on device"):
        train(run_of(tmp_path / "other", "....", filesystem=Full()))


def test_no_checkpoint_is_published_while_its_rows_are_in_memory_only(tmp_path: Path) -> None:
    with collected_log() as lines:
        sink = FullSink(tmp_path / "metrics.jsonl", range(2, 4))
        run = run_of(tmp_path, "....", sink=sink, max_failures=3, keep=9)
        seen: list[list[int]] = []
        run.progress = lambda step: seen.append(steps(tmp_path) if step > 1 else [])
        assert train(run) is None
    assert seen == [[], [1], [1], [1]]
    assert steps(tmp_path) == [1, 4]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 4
    reasons = [line for line in lines if "not saved" in line]
    path = tmp_path / "metrics.jsonl"
    assert reasons[1] == (
        f"checkpoint of step 3 not saved: rank 0: {path}: cannot be written; 2 rows are in memory only; free space; "
        "training goes on, the next checkpoint will try again"
    )
    sink.close()


def test_the_last_save_fails_with_its_rows(tmp_path: Path) -> None:
    sink = FullSink(tmp_path / "metrics.jsonl", range(2, 9))
    with pytest.raises(StorageError, match="1 row is in memory only"):
        train(run_of(tmp_path, "..", sink=sink))
    assert steps(tmp_path) == [1]


def test_a_run_directory_that_is_gone_ends_the_run_at_the_next_save(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run", rank=0)
    run_dir.open()
    run = run_of(tmp_path / "run", "......", interval=2, max_failures=99, require_directory=run_dir.require_same)
    run.progress = lambda step: (tmp_path / "run").rename(tmp_path / "moved") if step == 3 else None
    with pytest.raises(StorageError, match="run was deleted, renamed or unmounted under the run"):
        train(run)
    assert run.state.step == 4
    assert names(tmp_path) == {"moved"}
    assert steps(tmp_path / "moved") == [2]
    run_dir.close()


def test_a_run_directory_lost_during_a_save_ends_the_run_too(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run", rank=0)
    run_dir.open()

    def lose(name: str, arguments: Sequence[Any]) -> None:
        if name == "make_dir" and (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "moved")

    run = run_of(
        tmp_path / "run",
        "...",
        max_failures=99,
        require_directory=run_dir.require_same,
        filesystem=HookedFilesystem(lose),
    )
    with pytest.raises(StorageError, match="run was deleted, renamed or unmounted under the run"):
        train(run)
    assert run.state.step == 1
    assert names(tmp_path) == {"moved"}
    run_dir.close()


def test_what_one_rank_cannot_see_any_more_ends_all(tmp_path: Path) -> None:
    def gone() -> None:
        raise StorageError("run.dir: gone")

    def act(control: ThreadControl) -> None:
        require = gone if control.rank else lambda: None
        train(run_of(tmp_path, "..", control=control, require_directory=require))

    errors = on_ranks(2, act)
    assert [(type(error), str(error)) for error in errors] == [
        (StorageError, "run directory lost: rank 1: run.dir: gone")
    ] * 2
    assert not (tmp_path / "checkpoints").exists()


def test_a_profiler_is_told_of_every_step_around_its_data_and_its_row(tmp_path: Path) -> None:
    run = run_of(tmp_path, "...", interval=2)
    told: list[tuple[str, int]] = []
    run.profiler = cast(
        Any,
        SimpleNamespace(
            before=lambda step: told.append(("before", step)), after=lambda step: told.append(("after", step))
        ),
    )
    run.batches = (told.append(("data", 0)) or batches for batches in run.batches)
    run.sinks = [cast(Any, SimpleNamespace(log=lambda record: told.append(("row", record["step"]))))]
    train(run)
    assert told == [
        entry for step in (1, 2, 3) for entry in (("before", step), ("data", 0), ("row", step), ("after", step))
    ]


def test_samples_are_taken_behind_the_row_of_a_step_and_before_its_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, "..", keep=9)
    told: list[tuple[str, Any]] = []
    run.sinks = [cast(Any, SimpleNamespace(log=lambda record: told.append(("row", record["step"]))))]
    run.samples = cast(Any, SimpleNamespace(take=lambda step, *, is_last: told.append(("samples", is_last))))
    run.sync_metrics = lambda: told.append(("sync", run.state.step))
    train(run)
    first, last = [[("row", step), ("samples", step == 2), ("sync", step)] for step in (1, 2)]
    assert told == [*first, *last]


def test_the_time_of_a_save_is_in_the_row_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A second passes whenever somebody looks.
    seconds = itertools.count(1)
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(seconds)))
    rows: list[Any] = []
    for step_parts in (True, False):
        (tmp_path / str(step_parts)).mkdir()
        run = run_of(tmp_path / str(step_parts), "....", interval=2, log=LoggingConfig(step_parts=step_parts))
        run.sinks = [cast(Any, SimpleNamespace(log=rows.append))]
        train(run)
    assert [row["perf/save_s"] for row in rows[:3]] == [0.0, 0.0, rows[2]["perf/save_s"]]
    assert rows[2]["perf/save_s"] >= 1.0
    assert rows[3]["perf/save_s"] == 0.0
    assert not any("perf/save_s" in row for row in rows[4:])
