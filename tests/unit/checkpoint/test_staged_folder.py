from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, Filesystem, LocalFilesystem
from qwen3next_train.checkpoint.staged_folder import staged_folder
from qwen3next_train.errors import ConfigError, StorageError


def write(output: Path, *, num_bytes: int = 1, fs: Filesystem = LOCAL_FILESYSTEM) -> None:
    with staged_folder(fs, output, what="export-hf", num_bytes=num_bytes) as staged:
        (staged / "file").write_text("whole")


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def killed_while_writing(output: Path) -> None:
    """A process that dies by SIGKILL with a file half written."""
    child = os.fork()
    if child == 0:
        with staged_folder(LOCAL_FILESYSTEM, output, what="export-hf", num_bytes=1) as staged:
            (staged / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_it_appears_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "whole"
    with pytest.raises(ConfigError, match="out exists; remove it or choose another output"):
        write(tmp_path / "deep" / "out")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    fs = LocalFilesystem()
    fs.fsync_dir = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=r"out: cannot be written \(No space left on device\); free space or"):
        write(tmp_path / "out", fs=fs)
    with pytest.raises(StorageError, match="needed, "):
        write(tmp_path / "out", num_bytes=1 << 60)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "other", "a name\nwith a line break"])
def test_what_a_killed_process_left_goes_with_the_next_one_of_any_name(tmp_path: Path, name: str) -> None:
    killed_while_writing(tmp_path / name)
    assert len(names(tmp_path)) == 2
    killed_while_writing(tmp_path / "second")
    assert len(names(tmp_path)) == 2
    write(tmp_path / "next")
    assert names(tmp_path) == ["next"]


def test_what_a_killed_process_left_makes_room_first(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "out")
    with pytest.raises(StorageError, match="needed, "):
        write(tmp_path / "next", num_bytes=1 << 60)
    assert names(tmp_path) == []


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(LOCAL_FILESYSTEM, tmp_path / "slow", what="export-hf", num_bytes=1) as staged:
        (staged / "file").write_text("whole")
        write(tmp_path / "quick")
        assert (staged / "file").read_text() == "whole"
    assert names(tmp_path) == ["quick", "slow"]


def test_what_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    for name in (".tmp-mine-0a1b2c3d", ".tmp-mine", "tmp-mine-0a1b2c3d.lock"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / ".tmp-pipe-0a1b2c3d.lock.x")
    (tmp_path / ".tmp-link-0a1b2c3d.lock").symlink_to(tmp_path / "precious")
    before = names(tmp_path)
    write(tmp_path / "out")
    assert names(tmp_path) == sorted([*before, "out"])


@pytest.mark.parametrize("after", ["make_dir", "rename"])
def test_a_kill_between_folder_and_lock_file_leaves_nothing_for_ever(tmp_path: Path, after: str) -> None:
    class Dying(LocalFilesystem):
        def make_dir(self, path: Path) -> None:
            if after == "make_dir":
                os.kill(os.getpid(), signal.SIGKILL)
            super().make_dir(path)

        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with staged_folder(Dying(), tmp_path / "out", what="export-hf", num_bytes=1):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    write(tmp_path / "next")
    assert names(tmp_path) == (["next"] if after == "make_dir" else ["next", "out"])


def test_a_filesystem_without_locks_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    killed_while_writing(tmp_path / "out")
    left = names(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "next")
    assert names(tmp_path) == [*left, "next"], "whose process lives cannot be told"
