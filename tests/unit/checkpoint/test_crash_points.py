"""Die at every single file operation of a save; lose power there; fail there. A checkpoint always survives."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import VerifiedCheckpoint
from qwen3next_train.errors import StorageError
from tests.unit.checkpoint.support import (
    CutFilesystem,
    FailingFilesystem,
    HookedFilesystem,
    Killed,
    assert_holds,
    count_operations,
    logical_state,
    manager,
    names,
    save,
)

OLDER = 1
NEWER = 2
OLD_CONTENT = 77


def _prepare(directory: Path, scenario: str) -> None:
    """Fill a checkpoints directory with what an earlier attempt left."""
    if scenario == "first save":
        return
    save(manager(directory), OLDER)
    if scenario == "same step":
        save(manager(directory), NEWER, of=OLD_CONTENT)
    if scenario == "after a cut publication":
        (directory / "step_00000001").rename(directory / ".replaced-step_00000001-0a1b2c3d")
        shutil.copytree(directory / ".replaced-step_00000001-0a1b2c3d", directory / ".tmp-step_00000001-0a1b2c3d")


def _check(directory: Path, scenario: str) -> str:
    """Whichever checkpoint discovery returns, it must be whole; says which one it is."""
    found = manager(directory).find_latest()
    if found is None:
        assert scenario == "first save"
        return "none"
    if found.step == NEWER and scenario == "same step":
        content = _content(found)
        assert_holds(found, NEWER, of=content)
        return "old" if content == OLD_CONTENT else "new"
    assert scenario != "same step"
    assert_holds(found, found.step)
    return "new" if found.step == NEWER else "old"


def _content(found: VerifiedCheckpoint) -> int:
    stored = FragmentReader(found.path, found.manifest).read("norm.weight", "master", 0, 5)
    return OLD_CONTENT if stored.equal(logical_state(OLD_CONTENT)["norm.weight"]["master"]) else NEWER


@pytest.fixture
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A rank writes 768 bytes of tensors, to so many files side by side."""
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 768 // request.param)
    return int(request.param)


WITH_OLDER = [("older step", 1), ("same step", 1), pytest.param("same step", 3, marks=pytest.mark.slow)]
SCENARIOS = [("first save", 1), *WITH_OLDER, ("after a cut publication", 1)]


@pytest.mark.parametrize(("scenario", "files"), SCENARIOS, indirect=["files"])
def test_death_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, scenario: str, files: int
) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    _prepare(template, scenario)
    outcomes = []
    for cut in range(10_000):
        directory = tmp_path / f"cut_{cut}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = CutFilesystem(cut)
        try:
            save(manager(directory, keep=1, filesystem=filesystem), NEWER)
        except Killed:
            outcomes.append(_check(directory, scenario))
        else:
            break
        finally:
            filesystem.close_all()
    assert len(list((directory / "step_00000002").glob("rank_*"))) == files
    assert len(outcomes) > 25
    # Discovery turns from old to new once, at the rename that publishes, and never back.
    before = "none" if scenario == "first save" else "old"
    assert outcomes == [before] * outcomes.count(before) + ["new"] * outcomes.count("new")
    assert outcomes.count(before) > 10
    assert outcomes.count("new") > 2


@pytest.mark.parametrize(("scenario", "files"), SCENARIOS, indirect=["files"])
def test_power_loss_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, scenario: str, files: int
) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    _prepare(template, scenario)
    num_states = 0
    for cut in range(10_000):
        num_kept = 0
        while True:
            directory = tmp_path / f"cut_{cut}_{num_kept}" / "checkpoints"
            shutil.copytree(template.parent, directory.parent)
            filesystem = CutFilesystem(cut)
            try:
                save(manager(directory, keep=1, filesystem=filesystem), NEWER)
            except Killed:
                filesystem.lose_power(num_kept)
                _check(directory, scenario)
                num_states += 1
            else:
                assert num_states > 25
                assert len(list((directory / "step_00000002").glob("rank_*"))) == files
                return
            finally:
                filesystem.close_all()
            if num_kept >= len(filesystem.unsynced_names):
                break
            num_kept += 1


@pytest.mark.parametrize(("scenario", "files"), WITH_OLDER, indirect=["files"])
def test_the_save_after_a_death_succeeds_and_leaves_no_trace_of_it(tmp_path: Path, scenario: str, files: int) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    _prepare(template, scenario)
    num_operations = 0
    for cut in range(10_000):
        directory = tmp_path / f"cut_{cut}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = CutFilesystem(cut)
        try:
            save(manager(directory, keep=2, filesystem=filesystem), NEWER)
        except Killed:
            save(manager(directory, keep=2), 3)
            left = names(directory)
            assert "step_00000003" in left
            assert all(name.startswith("step_") for name in left)
            assert len(left) == 2
            assert_holds(manager(directory).find_latest(), 3)
        else:
            break
        finally:
            filesystem.close_all()
        num_operations += 1
    assert len(list((directory / "step_00000002").glob("rank_*"))) == files
    assert num_operations > 25


@pytest.mark.parametrize(("scenario", "files"), WITH_OLDER, indirect=["files"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_file_operation_is_one_line_and_harms_nothing(
    tmp_path: Path, scenario: str, files: int, code: int
) -> None:
    template = tmp_path / "template" / "checkpoints"
    template.parent.mkdir()
    _prepare(template, scenario)
    shutil.copytree(template.parent, tmp_path / "counted")
    total = count_operations(
        lambda filesystem: save(manager(tmp_path / "counted" / "checkpoints", keep=1, filesystem=filesystem), NEWER)
    )
    num_failed_saves = 0
    for fail_at in range(total):
        directory = tmp_path / f"fail_{fail_at}" / "checkpoints"
        shutil.copytree(template.parent, directory.parent)
        filesystem = FailingFilesystem(fail_at, code)
        before = names(directory)
        text = _text_of_failure(directory, filesystem)
        assert filesystem.failed_operation
        outcome = _check(directory, scenario)
        if text:
            num_failed_saves += 1
            assert "\n" not in text
            assert "checkpoint of step 2 not saved: rank 0: " in text
            assert ("; needed " in text) == (code == errno.ENOSPC)
            assert names(directory) == before or outcome == "new"
            assert not any(name.startswith(".tmp-") for name in names(directory))
        filesystem.close_all()
    assert len(list((tmp_path / "counted" / "checkpoints" / "step_00000002").glob("rank_*"))) == files
    assert 15 < num_failed_saves < total


def test_a_disk_that_stays_full_leaves_the_older_checkpoint_and_says_what_is_needed(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    save(manager(directory), OLDER)
    filesystem = FailingFilesystem(0, errno.ENOSPC, once=False, only=("write",))
    with pytest.raises(StorageError, match=r"No space left on device; needed [0-9.]+ KiB, available [0-9.]+ [GT]iB"):
        save(manager(directory, filesystem=filesystem), NEWER)
    assert names(directory) == {"step_00000001"}
    assert_holds(manager(directory).find_latest(), OLDER)


def test_everything_is_synced_before_the_rename_and_nothing_is_deleted_before_its_own_sync(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    save(manager(directory), OLDER)
    save(manager(directory), NEWER, of=OLD_CONTENT)
    filesystem = HookedFilesystem()
    save(manager(directory, keep=1, filesystem=filesystem), NEWER)
    changing = ("create", "fsync", "fsync_dir", "rename", "unlink", "remove_dir", "make_dir")
    log = [(operation, _plain(name)) for operation, name in filesystem.log if operation in changing]
    assert log == [
        ("make_dir", ".tmp"),
        ("create", "rank_00000.safetensors"),
        ("fsync", "rank_00000.safetensors"),
        ("create", "MANIFEST.json"),
        ("fsync", "MANIFEST.json"),
        ("fsync_dir", ".tmp"),
        ("rename", "step_00000002"),
        ("rename", ".tmp"),
        ("fsync_dir", "checkpoints"),
        ("create", ".tmp"),
        ("fsync", ".tmp"),
        ("rename", ".tmp"),
        ("unlink", "MANIFEST.json"),
        ("unlink", "rank_00000.safetensors"),
        ("remove_dir", ".replaced"),
        ("rename", "step_00000001"),
        ("fsync_dir", "checkpoints"),
        ("unlink", "MANIFEST.json"),
        ("unlink", "rank_00000.safetensors"),
        ("remove_dir", ".trash"),
    ]


def _text_of_failure(directory: Path, filesystem: FailingFilesystem) -> str:
    try:
        save(manager(directory, keep=1, filesystem=filesystem), NEWER)
    except StorageError as error:
        return str(error)
    return ""


def _plain(name: str) -> str:
    return name.split("-")[0] if name.startswith(".") else name
