"""Saves beside training: what they hold, what they survive, and what the thread that trains is told."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.manager import SaveReport
from qwen3next_train.checkpoint.snapshot import Snapshot, SnapshotBuffer, snapshot_bytes
from qwen3next_train.engine.base import Fragment
from qwen3next_train.errors import DivergedError, StorageError
from qwen3next_train.held_elements import Runs
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from tests.unit.checkpoint.support import (
    CutFilesystem,
    FailingFilesystem,
    HookedFilesystem,
    Killed,
    assert_holds,
    collected_log,
    count_operations,
    fragments_of,
    header,
    manager,
    names,
    on_two_threads_of_ranks,
    save,
    train_state,
)

CPU = torch.device("cpu")


def saver(
    directory: Path,
    *,
    keep: int = 2,
    filesystem: Any = None,
    control: ControlGroup | None = None,
    saving: ControlGroup | None = None,
    has_room: Callable[[int], bool] = lambda num_bytes: True,
) -> BackgroundSaver:
    control = control or SingleProcess()
    checkpoints = manager(directory, control=saving or control, keep=keep, filesystem=filesystem)
    return BackgroundSaver(checkpoints, control=control, device=CPU, enabled=True, has_room=has_room)


def begin(saves: BackgroundSaver, step: int, *, rank: int = 0, world_size: int = 1, state: Any = None) -> bool:
    return saves.start(
        step=step,
        fragments=fragments_of(step, rank, world_size) if state is None else state,
        train_state=train_state(step),
        rank_tensors={"rng": torch.tensor([step, rank])},
        header=header(world_size),
    )


def in_background(saves: BackgroundSaver, step: int) -> SaveReport | None:
    """As the loop does it: the state may change as soon as it is copied, and does."""
    state = fragments_of(step)
    assert begin(saves, step, state=state)
    saves.wait_for_copy()
    for fragment in state:
        for tensor in fragment.tensors.values():
            tensor.fill_(-1.0)
    return saves.finish()


def test_the_files_are_those_of_a_save_that_training_waits_for(tmp_path: Path) -> None:
    save(manager(tmp_path / "waited"), 3)
    saves = saver(tmp_path / "beside")
    # The buffer holds another state before.
    in_background(saves, 1)
    report = in_background(saves, 3)
    assert report is not None
    assert (report.step, report.path) == (3, tmp_path / "beside" / "step_00000003")
    for file in ("rank_00000.safetensors", "MANIFEST.json"):
        waited, beside = (tmp_path / each / "step_00000003" / file for each in ("waited", "beside"))
        assert waited.read_bytes() == beside.read_bytes()
    assert saves.finish() is None
    saves.close()


def test_state_is_copied_before_it_may_change_and_is_written_after(tmp_path: Path) -> None:
    may_write = threading.Event()

    def hold(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            assert may_write.wait(20)

    saves = saver(tmp_path, filesystem=HookedFilesystem(hold))
    state = fragments_of(5)
    assert begin(saves, 5, state=state)
    saves.wait_for_copy()
    assert (saves.step, saves.is_writing) == (5, True)
    for fragment in state:
        for tensor in fragment.tensors.values():
            tensor.zero_()
    assert not (tmp_path / "step_00000005").exists()
    may_write.set()
    assert saves.finish() is not None
    assert (saves.step, saves.is_writing) == (None, False)
    assert_holds(manager(tmp_path).find_latest(), 5)


@pytest.mark.parametrize("scenario", ["first save", "older step"])
def test_death_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, scenario: str) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    if scenario == "older step":
        save(manager(template), 1)
    outcomes = []
    for cut in range(10_000):
        directory = tmp_path / f"cut_{cut}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = CutFilesystem(cut)
        saves = saver(directory, keep=1, filesystem=filesystem)
        try:
            in_background(saves, 2)
        except Killed:
            found = manager(directory).find_latest()
            outcomes.append(None if found is None else found.step)
            if found is not None:
                assert_holds(found, found.step)
        else:
            break
        finally:
            filesystem.close_all()
    before = 1 if scenario == "older step" else None
    assert outcomes == [before] * outcomes.count(before) + [2] * outcomes.count(2)
    assert outcomes.count(before) > 10
    assert outcomes.count(2) > 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_file_operation_is_one_line_and_harms_nothing(tmp_path: Path, code: int) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    save(manager(template), 1)
    shutil.copytree(template.parent, tmp_path / "counted")
    total = count_operations(
        lambda filesystem: in_background(saver(tmp_path / "counted" / "checkpoints", keep=1, filesystem=filesystem), 2)
    )
    num_failed = 0
    for fail_at in range(total):
        directory = tmp_path / f"fail_{fail_at}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = FailingFilesystem(fail_at, code)
        saves = saver(directory, keep=1, filesystem=filesystem)
        text = _text_of_failure(saves)
        if text:
            num_failed += 1
            assert "checkpoint of step 2 not saved: rank 0: " in text
            assert not any(name.startswith(".tmp-") for name in names(directory))
            # The next one makes it good.
            assert in_background(saves, 3) is not None
            assert names(directory) == {"step_00000003"}
        filesystem.close_all()
        found = manager(directory).find_latest()
        assert_holds(found, found.step if found else 0)
    assert 15 < num_failed < total


def test_a_state_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    saves = saver(tmp_path)
    state = fragments_of(2)
    state[0].tensors["exp_avg"][1] = torch.nan
    assert begin(saves, 2, state=state)
    with pytest.raises(DivergedError, match=r"embed.weight: exp_avg is not finite in elements \[0, 35\)"):
        saves.finish()
    assert not (tmp_path / "step_00000002").exists()


def test_where_memory_is_short_on_one_rank_all_wait_for_the_save_and_it_is_said_once(tmp_path: Path) -> None:
    rooms = {0: True, 1: False}

    def act(control: ControlGroup, saving: ControlGroup) -> list[bool]:
        saves = saver(tmp_path, control=control, saving=saving, has_room=lambda num_bytes: rooms[control.rank])
        begun = [begin(saves, step, rank=control.rank, world_size=2) for step in (1, 2)]
        control.all_true(True)
        rooms[1] = True
        control.all_true(True)
        begun.append(begin(saves, 3, rank=control.rank, world_size=2))
        saves.finish()
        return begun

    with collected_log() as lines:
        assert on_two_threads_of_ranks(2, act) == [[False, False, True]] * 2
    short = [line for line in lines if "checkpoint.async_save" in line]
    assert sorted(line.partition(" B of host memory for each process are not free; ")[0] for line in short) == sorted(
        f"checkpoint.async_save: {snapshot_bytes(fragments_of(1, rank, 2))}" for rank in range(2)
    )
    assert_holds(manager(tmp_path).find_latest(), 3)


def test_all_ranks_learn_of_the_failure_of_one(tmp_path: Path) -> None:
    def act(control: ControlGroup, saving: ControlGroup) -> str:
        full = FailingFilesystem(0, errno.ENOSPC, once=False, only=("write",))
        filesystem = full if control.rank else HookedFilesystem()
        saves = saver(tmp_path, control=control, saving=saving, filesystem=filesystem)
        assert begin(saves, 4, rank=control.rank, world_size=2)
        saves.wait_for_copy()
        # Meanwhile the thread that trains agrees on other things.
        for _ in range(5):
            control.sum_ints([1])
        with pytest.raises(StorageError) as caught:
            saves.finish()
        return str(caught.value)

    texts = on_two_threads_of_ranks(2, act)
    assert texts[0] == texts[1]
    assert "checkpoint of step 4 not saved: rank 1: rank_00001.safetensors: No space left on device" in str(texts[0])
    assert names(tmp_path) == set()


def test_a_save_whose_ranks_never_met_does_not_hold_training_up(tmp_path: Path) -> None:
    class Lost(SingleProcess):
        def broadcast_json(self, value: Any) -> Any:
            raise RuntimeError("Connection closed by peer")

    saves = saver(tmp_path, saving=Lost())
    assert begin(saves, 1)
    saves.wait_for_copy()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saves.finish()


def test_where_training_ends_in_an_error_the_save_in_flight_is_waited_for(tmp_path: Path) -> None:
    saves = saver(tmp_path)
    assert begin(saves, 1)
    report = saves.conclude()
    assert report is not None
    assert report.step == 1
    full = saver(tmp_path, filesystem=FailingFilesystem(0, errno.ENOSPC, once=False, only=("write",)))
    assert begin(full, 2)
    with collected_log() as lines:
        assert full.conclude() is None
    assert [line for line in lines if "checkpoint of step 2 not saved" in line] == lines
    assert saves.conclude() is None


def test_a_buffer_keeps_every_tensor_in_its_dtype_and_place() -> None:
    def state(value: float) -> list[Fragment]:
        tensors: Any = {"master": torch.full((5,), value), "exp_avg": torch.full((5,), value, dtype=torch.bfloat16)}
        return [
            Fragment("a", Runs(3, 5), tensors),
            Fragment("b", Runs(0, 17), {"master": torch.full((17,), 2 * value)}),
        ]

    # 20 and 10 bytes, then 68, each from a multiple of 64 on.
    assert snapshot_bytes(state(1.0)) == 64 + 64 + 128
    buffer = SnapshotBuffer(256, CPU)
    first = buffer.copy(state(1.0))
    second = buffer.copy(state(-0.1))
    assert [(fragment.name, fragment.runs) for fragment in second] == [("a", Runs(3, 5)), ("b", Runs(0, 17))]
    for copied, fresh in zip(_tensors(second), _tensors(state(-0.1)), strict=True):
        assert copied.dtype == fresh.dtype
        assert copied.equal(fresh)
    # One memory for all saves.
    assert [tensor.data_ptr() for tensor in _tensors(first)] == [tensor.data_ptr() for tensor in _tensors(second)]


@pytest.mark.gpu
def test_a_gpu_changes_its_state_only_when_that_is_copied() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.arange(1 << 27).float()
    state = [Fragment("a", Runs(0, values.numel()), {"master": values.to(device)})]
    buffer = SnapshotBuffer(snapshot_bytes(state), device)
    for _ in range(2):
        state[0].tensors["master"].copy_(values)
        snapshot = Snapshot(state, buffer, device)
        copies: list[Fragment] = []
        writer = threading.Thread(target=lambda snapshot=snapshot, copies=copies: copies.extend(snapshot.take()))
        writer.start()
        snapshot.wait()
        # Launched at once, half a gigabyte before the copy can be complete.
        state[0].tensors["master"].fill_(-1.0)
        writer.join()
        assert copies[0].tensors["master"].is_pinned()
        assert copies[0].tensors["master"].equal(values)
    buffer.close()


def _text_of_failure(saves: BackgroundSaver) -> str:
    try:
        in_background(saves, 2)
    except StorageError as error:
        return str(error)
    return ""


def _tensors(fragments: list[Fragment]) -> Iterator[torch.Tensor]:
    return (tensor for fragment in fragments for tensor in fragment.tensors.values())
