"""What the loop does around a save, and at the end of a run that diverges; the engine is a list of outcomes."""

from __future__ import annotations

import itertools
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.config.schema import CheckpointConfig, Config, LoggingConfig, RunConfig
from qwen3next_train.engine.base import Fragment, StepResult
from qwen3next_train.errors import DivergedError, StorageError
from qwen3next_train.metrics.sinks import JsonlSink
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from qwen3next_train.train import loop
from qwen3next_train.train.loop import Run, train
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.checkpoint.support import (
    HookedFilesystem,
    ThreadControl,
    collected_log,
    fragments_of,
    header,
    names,
    on_ranks,
    on_two_threads_of_ranks,
    train_state,
)
from tests.unit.model.small_models import small_config


class ScriptedEngine:
    """Steps whose gradients are finite or not."""

    def __init__(self, outcomes: str, *, rank: int = 0, world_size: int = 1) -> None:
        self._outcomes = iter(outcomes)
        self._share = (rank, world_size)
        self.fragments_are_finite = True

    def train_step(self, *arguments: object, **options: object) -> StepResult:
        return StepResult({"loss/lm": 1.0}, skipped=next(self._outcomes) == "x")

    def fragments(self) -> Iterator[Fragment]:
        for fragment in fragments_of(1, *self._share):
            if not self.fragments_are_finite:
                fragment.tensors["master"] = torch.full_like(fragment.tensors["master"], math.nan)
            yield fragment


def run_of(
    path: Path,
    outcomes: str,
    *,
    keep: int = 1,
    interval: int = 1,
    max_failures: int = 2,
    control: ControlGroup | None = None,
    sink: JsonlSink | None = None,
    require_directory: Callable[[], None] = lambda: None,
    filesystem: HookedFilesystem | None = None,
    start: int = 0,
    log: LoggingConfig | None = None,
    async_save: bool = False,
    saving: ControlGroup | None = None,
    has_room: Callable[[int], bool] = lambda num_bytes: True,
) -> Run:
    control = control or SingleProcess()
    config = Config(
        model=small_config(),
        run=RunConfig(steps=start + len(outcomes), max_skipped_steps=3),
        checkpoint=CheckpointConfig(interval=interval, keep=keep, max_failures=max_failures),
        logging=log or LoggingConfig(),
    )
    batch = SimpleNamespace(num_targets=(8,), num_tokens=8, sum_squared_lengths=64)
    checkpoints = CheckpointManager(
        path / "checkpoints", control=saving or control, keep=keep, filesystem=filesystem or HookedFilesystem()
    )
    return Run(
        config=config,
        control=control,
        engine=cast(Any, ScriptedEngine(outcomes, rank=control.rank, world_size=control.world_size)),
        batches=itertools.repeat(cast(Any, [batch])),
        data_wait_s=lambda: 0.0,
        validation=[],
        checkpoints=checkpoints,
        background=BackgroundSaver(
            checkpoints, control=control, device=torch.device("cpu"), enabled=async_save, has_room=has_room
        ),
        header=header(control.world_size),
        state=replace(train_state(start), skipped_steps=0),
        sinks=[] if sink is None else [sink],
        progress=lambda step: None,
        sync_metrics=sink.sync if sink else lambda: None,
        require_directory=require_directory,
        record_save=lambda step: None,
        throughput=Throughput(None, 1),
        stop=cast(Any, SimpleNamespace(requested=None, defer=lambda: None)),
    )


def steps(path: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in names(path / "checkpoints") if name.startswith("step_"))


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


class Full(HookedFilesystem):
    """A disk without space for checkpoints while ``full`` is set."""

    def __init__(self) -> None:
        super().__init__(self._refuse)
        self.full = True

    def _refuse(self, name: str, arguments: tuple[object, ...]) -> None:
        if self.full and name == "write":
            raise OSError(28, "No space left on device")


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


class FullSink(JsonlSink):
    """Metrics on a disk that is full from one step to another."""

    def __init__(self, path: Path, full: range) -> None:
        super().__init__(path, resume_step=0)
        self._full = full

    def log(self, record: Any) -> None:
        self._is_full = record["step"] in self._full
        super().log(record)

    def _write_pending(self) -> None:
        if self._is_full:
            self._report(OSError(28, "No space left on device"))
        else:
            super()._write_pending()


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


class Held(HookedFilesystem):
    """A disk that takes no checkpoint while ``is_held``."""

    def __init__(self) -> None:
        super().__init__(self._hold)
        self._free = threading.Event()
        self._free.set()
        self.reached = threading.Event()

    def _hold(self, name: str, arguments: tuple[object, ...]) -> None:
        if name == "write":
            self.reached.set()
            assert self._free.wait(20)

    def hold(self) -> None:
        self._free.clear()

    def let_go(self) -> None:
        self._free.set()


def _written(run: Run) -> None:
    """Wait until the thread has come to its end; what it came to is taken up at the step's end."""
    while run.background.is_writing:
        time.sleep(0.001)


def _saved(run: Run) -> list[int]:
    saved: list[int] = []
    run.record_save = saved.append
    return saved


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    disk = Held()
    run = run_of(tmp_path, "......", interval=3, keep=9, filesystem=disk, async_save=True)
    seen: dict[int, int | None] = {}
    saved = _saved(run)

    def progress(step: int) -> None:
        if step == 3:
            disk.hold()
        if step == 5:
            seen[step] = run.background.step
            disk.let_go()
            _written(run)

    run.progress = progress
    assert train(run) is None
    # Step 5 was made before that of step 3 was written; the last one is waited for.
    assert seen == {5: 3}
    assert steps(tmp_path) == [3, 6]
    assert saved == [3, 6]
    assert run.background.step is None


def test_a_save_that_is_due_waits_for_the_one_before_and_says_so_once(tmp_path: Path) -> None:
    disk = Held()
    run = run_of(tmp_path, ".......", interval=2, keep=9, filesystem=disk, async_save=True)
    said: list[str] = []

    def progress(step: int) -> None:
        if step in (2, 4):
            disk.hold()
            # Later than the save of the next step can be due, or it would not have to wait.
            threading.Timer(0.2, disk.let_go).start()

    run.progress = progress
    with collected_log(logging.INFO) as lines:
        assert train(run) is None
        said = [line for line in lines if "is due while" in line]
    assert steps(tmp_path) == [2, 4, 6, 7]
    assert len(said) == 1
    assert re.fullmatch(
        r"checkpoint: that of step 4 is due while that of step 2 was still being written: waited 0\.\d s; "
        r"training waits whenever saves take longer than checkpoint\.interval \(said once\)",
        said[0],
    )


def test_failed_saves_beside_training_count_as_others_do(tmp_path: Path) -> None:
    disk = Full()
    run = run_of(tmp_path, "........", filesystem=disk, max_failures=3, keep=9, interval=2, async_save=True)

    def progress(step: int) -> None:
        if run.background.step is not None:
            _written(run)
        disk.full = step < 5

    run.progress = progress
    with collected_log() as lines:
        assert train(run) is None
    assert [line.partition("checkpoint of ")[2].partition(":")[0] for line in lines] == [
        "step 2 not saved",
        "step 4 not saved",
    ]
    assert all("training goes on, the next checkpoint will try again" in line for line in lines)
    assert steps(tmp_path) == [6, 8]
    (tmp_path / "other").mkdir()
    endless = run_of(tmp_path / "other", "." * 99, filesystem=Full(), max_failures=2, async_save=True)
    with pytest.raises(StorageError, match="No space left on device"):
        train(endless)
    # That of step 2 waits for that of step 1, that of step 3 for that of step 2.
    assert endless.state.step <= 3


def test_a_stop_waits_for_the_save_in_flight_and_saves_its_own_step(tmp_path: Path) -> None:
    disk = Held()
    run = run_of(tmp_path, "......", interval=2, keep=9, filesystem=disk, async_save=True)
    saved = _saved(run)

    def progress(step: int) -> None:
        if step == 2:
            disk.hold()
        if step == 3:
            run.stop.requested = "SIGTERM"  # type: ignore[misc]
            disk.let_go()

    run.progress = progress
    assert train(run) == "SIGTERM"
    assert steps(tmp_path) == saved == [2, 3]


def test_the_rows_of_a_step_are_durable_before_its_checkpoint_is_begun(tmp_path: Path) -> None:
    sink = FullSink(tmp_path / "metrics.jsonl", range(2, 4))
    run = run_of(tmp_path, "....", sink=sink, max_failures=3, keep=9, async_save=True)
    assert train(run) is None
    assert steps(tmp_path) == [1, 4]
    sink.close()


def test_a_run_directory_lost_while_a_checkpoint_is_written_ends_the_run(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run", rank=0)
    run_dir.open()
    disk = Held()
    run = run_of(
        *(tmp_path / "run", "......"),
        interval=2,
        max_failures=99,
        require_directory=run_dir.require_same,
        filesystem=disk,
        async_save=True,
    )

    def progress(step: int) -> None:
        if step == 2:
            disk.hold()
        if step == 3:
            assert disk.reached.wait(20)
            (tmp_path / "run").rename(tmp_path / "moved")
            disk.let_go()

    run.progress = progress
    with pytest.raises(StorageError, match="run was deleted, renamed or unmounted under the run"):
        train(run)
    assert run.state.step <= 4
    assert names(tmp_path) == {"moved"}
    assert steps(tmp_path / "moved") == []
    run_dir.close()


def test_divergence_waits_for_the_checkpoint_it_names(tmp_path: Path) -> None:
    disk = Held()
    run = run_of(tmp_path, "..xxx", interval=2, filesystem=disk, async_save=True)

    def progress(step: int) -> None:
        if step == 2:
            disk.hold()
        if step == 4:
            disk.let_go()

    run.progress = progress
    with pytest.raises(DivergedError, match=r"step 5: .*--resume.from 2 "):
        train(run)


def test_weights_that_are_not_finite_end_a_run_that_saves_beside_training(tmp_path: Path) -> None:
    run = run_of(tmp_path, "......", interval=2, keep=9, async_save=True)
    engine = cast(ScriptedEngine, run.engine)
    run.progress = lambda step: setattr(engine, "fragments_are_finite", step < 3)
    with pytest.raises(DivergedError, match=r"is not finite in elements .*; go back to .*--resume.from 2 "):
        train(run)
    assert steps(tmp_path) == [2]
    assert run.state.step in (5, 6)


def test_an_error_of_training_leaves_the_save_in_flight_whole(tmp_path: Path) -> None:
    disk = Held()
    run = run_of(tmp_path, "......", interval=2, filesystem=disk, async_save=True)
    saved = _saved(run)

    def progress(step: int) -> None:
        if step == 2:
            disk.hold()
        if step == 3:
            disk.let_go()
            raise ZeroDivisionError

    run.progress = progress
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert saved == steps(tmp_path) == [2]


def test_without_memory_for_a_copy_training_waits_for_its_saves(tmp_path: Path) -> None:
    run = run_of(tmp_path, "....", interval=2, keep=9, async_save=True, has_room=lambda num_bytes: False)
    seen: list[list[int]] = []
    run.progress = lambda step: seen.append(steps(tmp_path) if step > 2 else [])
    with collected_log() as lines:
        assert train(run) is None
    assert seen == [[], [], [2], [2]]
    assert len([line for line in lines if "are not free; training waits for its saves" in line]) == 1


def test_ranks_take_up_a_save_at_the_same_step(tmp_path: Path) -> None:
    def act(control: ThreadControl, saving: ThreadControl) -> tuple[list[int], list[int]]:
        run = run_of(tmp_path, "." * 9, interval=3, keep=9, control=control, saving=saving, async_save=True)
        taken_up: list[int] = []
        run.record_save = lambda step: taken_up.append(run.state.step)
        saved_at: list[int] = []
        run.progress = lambda step: saved_at.append(run.saved_step)
        train(run)
        return taken_up, saved_at

    (first, second) = on_two_threads_of_ranks(2, act)
    assert first == second
    assert steps(tmp_path) == [3, 6, 9]
