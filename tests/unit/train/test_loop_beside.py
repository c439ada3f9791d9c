"""What the loop does while a checkpoint is written beside training; the engine is a list of outcomes."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from qwen3next_train.errors import DivergedError, StorageError
from qwen3next_train.train.loop import Run, train
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.checkpoint.support import (
    HookedFilesystem,
    ThreadControl,
    collected_log,
    names,
    on_two_threads_of_ranks,
)
from tests.unit.train.loop_runs import Full, FullSink, ScriptedEngine, run_of, steps


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
