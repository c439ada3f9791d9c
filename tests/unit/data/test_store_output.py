from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data import store_output
from qwen3next_train.data.store_meta import entry_name
from qwen3next_train.data.store_output import is_written, require_unused, write_store
from qwen3next_train.data.store_writer import StoreWriter
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import ConfigError, DataError, StorageError

KEY, OTHER_KEY = "a" * 32, "b" * 32
SUFFIXES = (".bin", ".hashes", ".idx", ".meta.json")


def build(prefix: Path) -> float:
    with StoreWriter(prefix, np.dtype("<u2")) as writer:
        writer.append(np.arange(100))
        writer.finish(source="s", tokenizer_fingerprint="t", num_bytes=9, entry=entry_name(KEY, prefix.name, 1))
    return 1.5


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_the_store_and_nothing_else(tmp_path: Path) -> None:
    assert write_store(tmp_path / "new" / "s", KEY, build) == 1.5
    assert names_in(tmp_path / "new") == [f"s{suffix}" for suffix in SUFFIXES]
    assert TokenStore(tmp_path / "new" / "s").read(0, 3).tolist() == [0, 1, 2]
    assert is_written(tmp_path / "new" / "s", KEY)
    assert not is_written(tmp_path / "new" / "s", OTHER_KEY)


def as_file(path: Path) -> None:
    path.write_text("mine")


def as_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def as_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("put", [as_file, as_broken_link, as_folder, os.mkfifo])
def test_a_taken_name_is_rejected_before_anything_is_built(
    tmp_path: Path, suffix: str, put: Callable[[Path], None]
) -> None:
    taken = tmp_path / f"s{suffix}"
    put(taken)
    before = taken.lstat()
    with pytest.raises(ConfigError, match=rf"s\{suffix} exists; remove it or choose another output"):
        write_store(tmp_path / "s", KEY, build)
    assert (names_in(tmp_path), taken.lstat()) == ([taken.name], before)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, has_links: bool
) -> None:
    taken = tmp_path / f"s{suffix}"

    def slow_build(prefix: Path) -> float:
        taken.write_text("mine")
        return build(prefix)

    if not has_links:
        without_links(monkeypatch)
    with pytest.raises(ConfigError, match=rf"s\{suffix} exists"):
        write_store(tmp_path / "s", KEY, slow_build)
    assert taken.read_text() == "mine"


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    write_store(tmp_path / "s", KEY, build)
    assert names_in(tmp_path) == [f"s{suffix}" for suffix in SUFFIXES]


def killed(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill_self(*arguments: object) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


@pytest.mark.parametrize("num_links", [0, 1, 2, 3, 4])
def test_killed_between_two_links_goes_on(tmp_path: Path, num_links: int) -> None:
    """Some of the names are there, and are its own."""

    def work() -> None:
        link, count = os.link, 0

        def counted(source: Path, target: Path) -> None:
            nonlocal count
            if count == num_links:
                kill_self()
            link(source, target)
            count += 1

        os.link = counted  # type: ignore[assignment]
        store_output.sync_directory = kill_self  # type: ignore[assignment]
        write_store(tmp_path / "s", KEY, build)

    killed(work)
    assert len(list(tmp_path.glob("s.*"))) == num_links
    require_unused(tmp_path / "s")
    write_store(tmp_path / "s", KEY, lambda prefix: 1.5)
    assert names_in(tmp_path) == [f"s{suffix}" for suffix in SUFFIXES]
    TokenStore(tmp_path / "s").check()


def test_leftovers_are_removed_by_the_next_one_of_any_name_unless_somebody_is_at_work(tmp_path: Path) -> None:
    killed(partial(write_store, tmp_path / "killed", OTHER_KEY, kill_self))
    at_work = tmp_path / f".busy-{OTHER_KEY}.partial"
    theirs = (tmp_path / ".notes.partial", tmp_path / f".x-{OTHER_KEY}.partial")
    for path in (at_work, *theirs):
        path.mkdir()
        (path / "file").touch()
    (tmp_path / f".half-{OTHER_KEY}.removed").mkdir()
    assert (tmp_path / f".killed-{OTHER_KEY}.partial").exists()
    with (at_work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_store(tmp_path / "s", KEY, build)
    kept = [path.name for path in (at_work, *theirs)]
    assert names_in(tmp_path) == sorted([*kept, *(f"s{suffix}" for suffix in SUFFIXES)])


def test_without_locks_nobody_is_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    killed(partial(write_store, tmp_path / "killed", OTHER_KEY, kill_self))
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_store(tmp_path / "s", KEY, build)
    assert names_in(tmp_path) == sorted([f".killed-{OTHER_KEY}.partial", *(f"s{suffix}" for suffix in SUFFIXES)])


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    def build_meanwhile(prefix: Path) -> float:
        with pytest.raises(ConfigError, match="another process is writing"):
            write_store(tmp_path / "s", KEY, build)
        return build(prefix)

    write_store(tmp_path / "s", KEY, build_meanwhile)
    assert is_written(tmp_path / "s", KEY)


@pytest.mark.parametrize(
    ("error", "raised", "is_kept"),
    [
        (DataError("broken line"), DataError, False),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, False),
        (StorageError("x: cannot be read"), StorageError, True),
        (OSError(errno.EIO, "Input/output error"), StorageError, True),
    ],
)
def test_what_is_kept_after_an_error(tmp_path: Path, error: Exception, raised: type[Exception], is_kept: bool) -> None:
    def fail(prefix: Path) -> float:
        raise error

    with pytest.raises(raised):
        write_store(tmp_path / "s", KEY, fail)
    assert names_in(tmp_path) == ([f".s-{KEY}.partial"] if is_kept else [])


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.idx").touch()

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(StorageError, match=r"cannot be read \(Permission denied\)"):
        require_unused(tmp_path / "s")
