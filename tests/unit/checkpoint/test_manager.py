from __future__ import annotations

import errno
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager, SaveReport, VerifiedCheckpoint
from qwen3next_train.checkpoint.names import list_checkpoints
from qwen3next_train.checkpoint.publication import set_aside
from qwen3next_train.checkpoint.train_state import rng_state
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment
from qwen3next_train.errors import CheckpointError, ConfigError, DivergedError, PeerLostError, StorageError
from qwen3next_train.parallel.control import SingleProcess
from tests.unit.checkpoint.support import (
    FailingFilesystem,
    HookedFilesystem,
    ThreadControl,
    assert_holds,
    collected_log,
    fragments_of,
    header,
    manager,
    names,
    on_ranks,
    save,
    train_state,
)


def _on_two(directory: Path, step: int, filesystems: tuple[HookedFilesystem, HookedFilesystem]) -> list[object]:
    def act(control: ThreadControl) -> SaveReport:
        mine = manager(directory, control=control, filesystem=filesystems[control.rank])
        return save(mine, step, rank=control.rank, world_size=2)

    return list(on_ranks(2, act))


def test_the_report_tells_where_and_how_much(tmp_path: Path) -> None:
    report = save(manager(tmp_path / "c"), 12)
    assert report.path == tmp_path / "c" / "step_00000012"
    assert report.num_bytes == (report.path / "rank_00000.safetensors").stat().st_size
    assert (tmp_path / "c" / "latest").read_text() == "step_00000012\n"
    assert {path.name for path in report.path.iterdir()} == {"MANIFEST.json", "rank_00000.safetensors"}


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks_write_what_one_reads(tmp_path: Path, world_size: int) -> None:
    def act(control: ThreadControl) -> VerifiedCheckpoint | None:
        mine = manager(tmp_path / "c", control=control)
        save(mine, 5, rank=control.rank, world_size=world_size)
        return mine.find_latest()

    found = on_ranks(world_size, act)
    assert [entry.step for entry in found if isinstance(entry, VerifiedCheckpoint)] == [5] * world_size
    assert_holds(manager(tmp_path / "c").find_latest(), 5)


def test_the_newest_are_kept_and_no_more(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    for step in (1, 2, 3, 10, 11):
        save(checkpoints, step)
        assert len(names(tmp_path)) <= 2
    assert names(tmp_path) == {"step_00000010", "step_00000011"}


def test_a_damaged_checkpoint_does_not_count_as_kept_and_goes_when_it_is_old(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(manager(tmp_path, keep=3), step)
    (tmp_path / "step_00000003" / "rank_00000.safetensors").unlink()
    resumed = manager(tmp_path, keep=2)
    found = resumed.find_latest()
    assert found is not None
    assert found.step == 2
    save(resumed, 4)
    assert names(tmp_path) == {"step_00000002", "step_00000003", "step_00000004"}
    save(resumed, 5)
    assert names(tmp_path) == {"step_00000004", "step_00000005"}


def test_checkpoints_of_an_earlier_attempt_are_verified_once_before_they_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(manager(tmp_path, keep=3), step)
    filesystem = HookedFilesystem()
    resumed = manager(tmp_path, keep=3, filesystem=filesystem)
    resumed.find_latest()
    num_opens = []
    for step in (4, 5):
        filesystem.log.clear()
        save(resumed, step)
        num_opens.append(sum(entry == ("open", "rank_00000.safetensors") for entry in filesystem.log))
    assert names(tmp_path) == {"step_00000003", "step_00000004", "step_00000005"}
    # Step 3 was verified by discovery and 4 was written here: only 2 is read again, and only once.
    assert num_opens == [1, 0]


def test_a_checkpoint_saved_while_steps_are_skipped_does_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step)
    for step in (4, 5):
        save(checkpoints, step, consecutive_skips=step - 3)
    good = {"step_00000002", "step_00000003"}
    assert names(tmp_path) == good | {"step_00000004", "step_00000005"}
    # A later attempt learns it from the checkpoints themselves.
    resumed = manager(tmp_path, keep=2)
    save(resumed, 6, consecutive_skips=3)
    assert good < names(tmp_path)
    assert resumed.find_last_good() == 3
    found = resumed.find_latest()
    assert found is not None
    assert (found.step, found.manifest.train_state.consecutive_skips) == (6, 3)
    save(resumed, 7)
    assert names(tmp_path) == {f"step_{step:08d}" for step in (3, 4, 5, 6, 7)}
    save(resumed, 8)
    assert names(tmp_path) == {"step_00000007", "step_00000008"}


def test_the_last_good_checkpoint_is_an_intact_one(tmp_path: Path) -> None:
    assert manager(tmp_path / "c").find_last_good() is None
    for step in (1, 2):
        save(manager(tmp_path / "c"), step)
    (tmp_path / "c" / "step_00000002" / "MANIFEST.json").unlink()
    assert manager(tmp_path / "c").find_last_good() == 1
    assert manager(tmp_path / "c").newest_step() == 2


def test_what_a_killed_save_left_makes_room_before_the_next_one_writes(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    for name in (".tmp-step_00000002-0a1b2c3d", ".trash-step_00000000-0a1b2c3d", ".replaced-step_00000001-0a1b2c3d"):
        (tmp_path / name).mkdir()
    seen: list[set[str]] = []

    def look(name: str, arguments: tuple[object, ...]) -> None:
        if name == "write" and not seen:
            seen.append({entry for entry in names(tmp_path) if not entry.startswith(".tmp-step_00000003")})

    save(manager(tmp_path, filesystem=HookedFilesystem(look)), 3)
    assert seen == [{"step_00000001", ".replaced-step_00000001-0a1b2c3d"}], "what may be whole is kept until then"
    assert names(tmp_path) == {"step_00000001", "step_00000003"}


def test_what_a_killed_save_left_goes_without_another_save(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    for name in (".tmp-step_00000002-0a1b2c3d", ".trash-step_00000000-0a1b2c3d", ".replaced-step_00000001-0a1b2c3d"):
        (tmp_path / name).mkdir()
    manager(tmp_path).remove_unfinished()
    assert names(tmp_path) == {"step_00000001", ".replaced-step_00000001-0a1b2c3d"}
    manager(tmp_path / "none").remove_unfinished()
    assert not (tmp_path / "none").exists()


def test_a_run_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        save(manager(tmp_path / "run" / "checkpoints"), 1)
    assert names(tmp_path) == set()


def test_checkpoints_after_the_one_just_saved_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    save(manager(tmp_path), 9)
    checkpoints = manager(tmp_path, keep=1)
    for step in (4, 5):
        save(checkpoints, step)
    assert names(tmp_path) == {"step_00000005", "step_00000009"}
    save(checkpoints, 10)
    assert names(tmp_path) == {"step_00000010"}


def test_what_a_cut_publication_moved_aside_is_put_back(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    (tmp_path / "step_00000001").rename(tmp_path / ".replaced-step_00000001-0a1b2c3d")
    assert_holds(manager(tmp_path).find_latest(), 1)
    save(manager(tmp_path), 2)
    assert names(tmp_path) == {"step_00000001", "step_00000002"}
    assert_holds(manager(tmp_path).find_latest(), 2)


def test_only_our_own_leftovers_are_swept(tmp_path: Path) -> None:
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "file").write_text("x")
    directory = tmp_path / "c"
    directory.mkdir()
    for name in (".tmp-mine", ".tmp-step_1-x", "step_7", "notes", ".trash", ".replaced-step_00000001-xyz"):
        (directory / name).mkdir()
    (directory / ".tmp-step_00000001-0a1b2c3d").mkdir()
    (directory / ".trash-step_00000001-0a1b2c3d").symlink_to(precious)
    kept = {".tmp-mine", ".tmp-step_1-x", "step_7", "notes", ".trash", ".replaced-step_00000001-xyz"}
    save(manager(directory), 1)
    assert names(directory) == {*kept, "step_00000001"}
    assert (precious / "file").exists()


def test_failing_to_delete_is_a_warning_and_made_good_later(tmp_path: Path) -> None:
    filesystem = FailingFilesystem(0, errno.EACCES, once=False, only=("unlink",))
    with collected_log() as lines:
        for step in (1, 2):
            save(manager(tmp_path, keep=1, filesystem=filesystem), step)
    assert len(lines) == 1
    assert "could not tidy up" in lines[0]
    assert_holds(manager(tmp_path).find_latest(), 2)
    save(manager(tmp_path, keep=1), 3)
    assert names(tmp_path) == {"step_00000003"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("operation", ["create", "write", "fsync", "close"])
def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path: Path, rank: int, operation: str) -> None:
    for report in _on_two(tmp_path, 1, (HookedFilesystem(), HookedFilesystem())):
        assert isinstance(report, SaveReport)
    failing = FailingFilesystem(0, errno.ENOSPC, once=False, only=(operation,))
    filesystems = (failing, HookedFilesystem()) if rank == 0 else (HookedFilesystem(), failing)
    errors = _on_two(tmp_path, 2, filesystems)
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert str(errors[0]) == str(errors[1])
    reason = f"rank {rank}: rank_0000{rank}.safetensors: No space left on device; needed "
    assert str(errors[0]).startswith(f"{tmp_path}: checkpoint of step 2 not saved: {reason}")
    assert names(tmp_path) == {"step_00000001"}


def test_a_disk_too_small_for_a_checkpoint_is_found_before_anything_is_written(tmp_path: Path) -> None:
    written: list[str] = []

    class Small(HookedFilesystem):
        """A disk with 1000 bytes left."""

        def free_bytes(self, path: Path) -> int:
            return 1000

    filesystem = Small(lambda name, arguments: written.append(name))
    save(manager(tmp_path), 1)
    with pytest.raises(StorageError, match=r"No space left on device; needed 1\.\d+ KiB, available 1000 B"):
        save(manager(tmp_path, filesystem=filesystem), 2)
    assert "write" not in written
    assert names(tmp_path) == {"step_00000001"}


def test_several_failing_ranks_are_counted(tmp_path: Path) -> None:
    first, second = (FailingFilesystem(0, errno.EIO, once=False, only=("create",)) for _ in range(2))
    errors = _on_two(tmp_path, 2, (first, second))
    text = "rank 0: rank_00000.safetensors: Input/output error (and 1 more rank)"
    assert [str(error) for error in errors] == [f"{tmp_path}: checkpoint of step 2 not saved: {text}"] * 2


def test_a_rank_that_does_not_see_the_directory_says_so(tmp_path: Path) -> None:
    class NodeLocal(HookedFilesystem):
        """A disk of its own."""

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            if name == "entry":
                return lambda path: None
            return super().__getattr__(name)

    errors = _on_two(tmp_path / "c", 2, (HookedFilesystem(), NodeLocal()))
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert "rank 1: " in str(errors[0])
    assert "run.dir must be on a filesystem that all ranks share" in str(errors[0])


def test_a_bug_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    def broken() -> Iterator[Fragment]:
        yield from fragments_of(1, 1, 2)
        raise RuntimeError("CUDA error:\nmisaligned address")

    def act(control: ThreadControl) -> SaveReport:
        return manager(tmp_path / "c", control=control).save(
            step=1,
            fragments=broken() if control.rank else fragments_of(1, 0, 2),
            train_state=train_state(1),
            rank_tensors={},
            header=header(2),
        )

    errors = on_ranks(2, act)
    assert [type(error) for error in errors] == [PeerLostError, RuntimeError]
    assert "rank 1: RuntimeError: CUDA error: misaligned address" in str(errors[0])
    assert not (tmp_path / "c").exists()


def test_a_value_that_is_not_finite_on_one_rank_stops_all_before_anything_is_written(tmp_path: Path) -> None:
    def act(control: ThreadControl) -> SaveReport:
        fragments = fragments_of(1, control.rank, 2)
        if control.rank:
            fragments[-1].tensors["master"][0] = math.nan
        return manager(tmp_path / "c", control=control).save(
            step=1, fragments=fragments, train_state=train_state(1), rank_tensors={}, header=header(2)
        )

    errors = on_ranks(2, act)
    assert [type(error) for error in errors] == [DivergedError, DivergedError]
    assert "rank 1: norm.weight: master is not finite" in str(errors[0])
    assert not (tmp_path / "c").exists()


def test_fragments_that_do_not_tile_are_never_published(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    with pytest.raises(RuntimeError, match=r"embed\.weight: the ranks' fragments do not tile"):
        manager(tmp_path).save(
            step=2, fragments=fragments_of(2)[1:], train_state=train_state(2), rank_tensors={}, header=header()
        )
    assert names(tmp_path) == {"step_00000001"}


def test_a_configuration_that_is_not_finite_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        manager(tmp_path).save(
            step=2,
            fragments=fragments_of(2),
            train_state=train_state(2),
            rank_tensors={},
            header=replace(header(), config={"lr": math.nan}),
        )
    assert names(tmp_path) == set()


def test_damage_only_one_rank_sees_is_skipped_by_all(tmp_path: Path) -> None:
    for step in (1, 2):
        assert all(isinstance(r, SaveReport) for r in _on_two(tmp_path, step, (HookedFilesystem(), HookedFilesystem())))

    def refuse(name: str, arguments: tuple[Path, ...]) -> None:
        if name == "open" and arguments[0].parent.name == "step_00000002" and "rank" in arguments[0].name:
            raise OSError(errno.ENOENT, "No such file or directory", str(arguments[0]))

    def act(control: ThreadControl) -> VerifiedCheckpoint | None:
        filesystem = HookedFilesystem(refuse) if control.rank else HookedFilesystem()
        return manager(tmp_path, control=control, filesystem=filesystem).find_latest()

    with collected_log() as lines:
        found = on_ranks(2, act)
    assert [entry.step for entry in found if isinstance(entry, VerifiedCheckpoint)] == [1, 1]
    assert "step_00000002 is damaged and skipped: rank_00001.safetensors: No such file or directory" in lines[0]


def test_ranks_that_see_different_checkpoints_of_one_name_take_neither(tmp_path: Path) -> None:
    def write(control: ThreadControl, disk: str, of: int) -> SaveReport:
        return save(manager(tmp_path / disk, control=control), 2, rank=control.rank, world_size=2, of=of)

    for disk, of in (("a", 5), ("b", 6)):
        (tmp_path / disk).mkdir()
        assert all(isinstance(report, SaveReport) for report in on_ranks(2, partial(write, disk=disk, of=of)))

    def look(control: ThreadControl) -> VerifiedCheckpoint | None:
        return manager(tmp_path / "ab"[control.rank], control=control).find_latest()

    errors = on_ranks(2, look)
    assert [type(error) for error in errors] == [CheckpointError, CheckpointError]
    assert "step_00000002: the ranks see different manifests" in str(errors[0])


def test_a_checkpoint_another_node_sees_late_is_waited_for(tmp_path: Path) -> None:
    assert all(isinstance(r, SaveReport) for r in _on_two(tmp_path, 1, (HookedFilesystem(), HookedFilesystem())))

    class Stale(HookedFilesystem):
        """Does not see a directory at first, as a network filesystem that remembers its absence."""

        num_looks = 0

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            if name == "entry" and self.num_looks < 2:
                self.num_looks += 1
                return lambda path: None
            return super().__getattr__(name)

    def act(control: ThreadControl) -> VerifiedCheckpoint | None:
        filesystem = Stale() if control.rank else HookedFilesystem()
        return manager(tmp_path, control=control, filesystem=filesystem).find_latest()

    assert [entry.step for entry in on_ranks(2, act) if isinstance(entry, VerifiedCheckpoint)] == [1, 1]


def test_a_directory_that_cannot_be_listed_is_a_storage_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a directory")

    def act(control: ThreadControl) -> VerifiedCheckpoint | None:
        return manager(tmp_path / "c", control=control).find_latest()

    errors = on_ranks(2, act)
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert "checkpoints cannot be listed: rank 0: c: Not a directory" in str(errors[1])


def test_generators_are_restored_only_by_as_many_ranks(tmp_path: Path) -> None:
    def write(control: ThreadControl) -> SaveReport:
        return manager(tmp_path, control=control).save(
            step=1,
            fragments=fragments_of(1, control.rank, 2),
            train_state=train_state(1),
            rank_tensors=rng_state() if control.rank == 0 else {"rng": torch.zeros(1)},
            header=header(2),
        )

    random.seed(5), torch.manual_seed(5)
    assert all(isinstance(report, SaveReport) for report in on_ranks(2, write))
    expected = (random.random(), torch.rand(1).item())

    def restore(control: ThreadControl) -> tuple[float, float] | None:
        mine = CheckpointManager(tmp_path, control=control, keep=1)
        found = mine.find_latest()
        assert found is not None
        if control.rank:
            return None
        assert mine.restore_rng(found, FragmentReader(found.path, found.manifest))
        return (random.random(), torch.rand(1).item())

    assert on_ranks(2, restore)[0] == expected
    alone = CheckpointManager(tmp_path, control=SingleProcess(), keep=1)
    found = alone.find_latest()
    assert found is not None
    before = torch.get_rng_state()
    assert not alone.restore_rng(found, FragmentReader(found.path, found.manifest))
    assert torch.get_rng_state().equal(before)


def test_a_glance_reads_the_newest_manifest_and_no_more(tmp_path: Path) -> None:
    assert manager(tmp_path / "c").glance() is None
    for step in (1, 2):
        save(manager(tmp_path / "c"), step)
    file = next((tmp_path / "c" / "step_00000002").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = manager(tmp_path / "c").glance()
    assert found is not None
    assert (found.state, found.config) == (train_state(2), header().config)
    file.write_bytes(b"cut")
    assert manager(tmp_path / "c").glance() is None
    (older,) = list_checkpoints(["step_00000001"])
    named = manager(tmp_path / "c").glance(older)
    assert named is not None
    assert (named.path, named.state.step, named.kinds) == (tmp_path / "c" / "step_00000001", 1, FRAGMENT_KINDS)


def test_a_step_is_found_by_its_number(tmp_path: Path) -> None:
    for step in (1, 2):
        save(manager(tmp_path / "c"), step)
    assert_holds(manager(tmp_path / "c").find_step(1), 1)
    with pytest.raises(ConfigError) as caught:
        manager(tmp_path / "c").find_step(3)
    assert str(caught.value) == (
        f"--resume.from: {tmp_path}/c has no checkpoint of step 3; give a step that it has: 2, 1"
    )
    with pytest.raises(ConfigError, match=r"it has none at all; leave --resume\.from out to start"):
        manager(tmp_path / "other").find_step(3)


def test_checkpoints_set_aside_are_whole_and_count_no_more(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    for step in (1, 2, 3):
        save(manager(directory, keep=9), step)
    assert set_aside(HookedFilesystem(), directory, 3) is None
    assert set_aside(HookedFilesystem(), directory, 1) == directory / "aside-1"
    assert names(directory) == {"step_00000001", "aside-1"}
    assert names(directory / "aside-1") == {"step_00000002", "step_00000003"}
    assert_holds(manager(directory).find_latest(), 1)
    assert_holds(manager(directory / "aside-1").find_latest(), 3)
    # A second time, with saves in between that delete nothing of the first.
    for step in (2, 3, 4):
        save(manager(directory, keep=1), step)
    assert set_aside(HookedFilesystem(), directory, 1) == directory / "aside-2"
    assert names(directory) == {"aside-1", "aside-2"}
    assert names(directory / "aside-1") == {"step_00000002", "step_00000003"}


def test_a_kill_while_setting_aside_loses_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    for step in (1, 2, 3):
        save(manager(directory, keep=9), step)

    def kill(name: str, arguments: Sequence[Any]) -> None:
        if name == "rename" and arguments[0].name == "step_00000002":
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        set_aside(HookedFilesystem(kill), directory, 1)
    assert_holds(manager(directory).find_latest(), 2)
    assert set_aside(HookedFilesystem(), directory, 1) == directory / "aside-2"
    assert names(directory / "aside-1") | names(directory / "aside-2") == {"step_00000002", "step_00000003"}
