from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from qwen3next_train.files import NO_LOCKS, lock_now, sync_directory


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_lock_is_for_one_and_goes_with_its_descriptor(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "lock"
    if kind == "file":
        path.touch()
    first, second = (os.open(path, os.O_RDONLY) for _ in range(2))
    assert lock_now(first)
    with pytest.raises(BlockingIOError):
        lock_now(second)
    os.close(first)
    assert lock_now(second)
    os.close(second)


@pytest.mark.parametrize(
    ("code", "unsupported", "is_error"),
    [
        *((code, NO_LOCKS, False) for code in NO_LOCKS),
        (errno.ENOLCK, frozenset(), True),
        (errno.EBADF, NO_LOCKS, True),
        (errno.EBADF, NO_LOCKS | {errno.EBADF}, False),
        (errno.EIO, NO_LOCKS, True),
    ],
)
def test_where_there_are_no_locks(
    monkeypatch: pytest.MonkeyPatch, code: int, unsupported: frozenset[int], is_error: bool
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    if is_error:
        with pytest.raises(OSError, match=os.strerror(code)):
            lock_now(0, unsupported)
    else:
        assert not lock_now(0, unsupported)


def test_names_reach_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_directory(tmp_path)
    assert synced == [tmp_path.stat().st_ino]
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        with pytest.raises(OSError, match=r"Not a directory|No such file"):
            sync_directory(tmp_path / name)
