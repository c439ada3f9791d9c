"""Whose a directory is: rejected when its files are not a run's, and locked while a run is in it."""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen3next_train.checkpoint.filesystem import (
    LOCAL_FILESYSTEM,
    UnusableFileError,
    read_chunks,
    read_file,
)
from qwen3next_train.checkpoint.names import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    MANIFEST_START,
    list_checkpoints,
    list_names,
)
from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.files import NO_LOCKS, lock_now
from qwen3next_train.log import get_logger
from qwen3next_train.train.run_info import RUN_INFO_NAME, is_run_info

LOCK_NAME = ".lock"

_LOCK_MODE = 0o640
_HOLDER_BYTES = 512
# NFS locks only what is open for writing, which no directory can be.
_NO_DIRECTORY_LOCKS = NO_LOCKS | {errno.EBADF, errno.EINVAL, errno.EISDIR}
_OF_THE_FILESYSTEM = frozenset({"lost+found", ".snapshot"})
_NUM_SHOWN = 3


def require_own(path: Path) -> None:
    """Make sure that a directory is empty or a run's, before anything in it is touched.

    A run's directory is known by its lock file, by ``run.json`` or by a checkpoint; empty folders are nobody's.

    Raises:
        ConfigError: it has files that no run has written.
        OSError: it cannot be read.
    """
    if read_holder(path) or _has_run_info(path) or _has_checkpoint(path):
        return
    foreign = [name for name in sorted(os.listdir(path)) if not _is_nobodys(path / name)]
    if foreign:
        listed = ", ".join(ascii(name)[1:-1] for name in foreign[:_NUM_SHOWN])
        more = f" and {len(foreign) - _NUM_SHOWN} more" if len(foreign) > _NUM_SHOWN else ""
        raise ConfigError(
            f"run.dir: {path} has files that no run has written ({listed}{more}); choose a new or an empty directory"
        )


def read_holder(path: Path) -> dict[str, Any]:
    """What the lock file of a directory says of the process that holds it or held it last; empty when it is no such."""
    try:
        holder = json.loads(read_file(LOCAL_FILESYSTEM, path / LOCK_NAME, max_bytes=1 << 16))
    except (OSError, UnusableFileError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(holder, dict) and all(isinstance(holder.get(key), str) for key in ("attempt", "host", "since"))
    return holder if is_ours else {}


class DirectoryLock:
    """A directory, locked by this process until :meth:`close`.

    The lock file says who holds it, and network filesystems lock it too. The directory itself is locked as well where
    that is possible: a lock file can be deleted under a run, and a second one would then hold another file.

    Args:
        path: the directory.
        attempt: name of the attempt, as the lock file says it.

    Raises:
        ConfigError: another process holds it.
        OSError: it cannot be locked or written.
    """

    def __init__(self, path: Path, attempt: str) -> None:
        self._path = path
        self._attempt = attempt
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._lock(self._descriptors[0], _NO_DIRECTORY_LOCKS)
            self._descriptors.append(self._open_file())
            if not self._lock(self._descriptors[1], NO_LOCKS):
                get_logger().warning(
                    "run.dir: %s is on a filesystem without locks; a second run in it would not be noticed", path
                )
            self._write_holder()
        except BaseException:
            self.close()
            raise
        os.register_at_fork(after_in_child=self.close)

    def rename_attempt(self, attempt: str) -> None:
        """Write another name of the attempt.

        Raises:
            OSError: the lock file cannot be written.
        """
        self._attempt = attempt
        self._write_holder()

    def keep(self) -> None:
        """Make the lock file anew when it was deleted under the run.

        Raises:
            StorageError: another process has taken the directory meanwhile.
            OSError: the lock file cannot be written.
        """
        if _is_at(self._descriptors[1], self._path / LOCK_NAME):
            return
        renewed = self._open_file()
        try:
            self._lock(renewed, NO_LOCKS)
        except ConfigError as error:
            os.close(renewed)
            raise StorageError(f"{error} (its {LOCK_NAME} was deleted under this run)") from error
        os.close(self._descriptors[1])
        self._descriptors[1] = renewed
        self._write_holder()
        get_logger().warning("run.dir: %s was deleted under the run and is made anew", self._path / LOCK_NAME)

    def close(self) -> None:
        """Give the lock back."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _open_file(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._path / LOCK_NAME, flags, _LOCK_MODE)

    def _lock(self, descriptor: int, unsupported: frozenset[int]) -> bool:
        """Lock what is open; whether the filesystem can."""
        try:
            return lock_now(descriptor, unsupported)
        except BlockingIOError:
            raise ConfigError(_in_use(self._path)) from None

    def _write_holder(self) -> None:
        since = datetime.now(UTC).isoformat(timespec="milliseconds")
        holder = {"attempt": self._attempt, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        # Of one length and in one write: a kill leaves the old or the new one, by which the directory is known.
        text = json.dumps(holder, indent=2).encode().ljust(_HOLDER_BYTES - 1) + b"\n"
        os.pwrite(self._descriptors[1], text, 0)
        os.ftruncate(self._descriptors[1], len(text))
        # Other nodes see it only when the server has it.
        os.fsync(self._descriptors[1])


def _in_use(path: Path) -> str:
    holder = read_holder(path)
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder['host']} since {holder['since']}"
    return f"run.dir: {path} is in use by {who}; stop that run or choose another directory"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _has_run_info(path: Path) -> bool:
    try:
        return is_run_info(LOCAL_FILESYSTEM, path / RUN_INFO_NAME)
    except OSError:
        return False


def _has_checkpoint(path: Path) -> bool:
    directory = path / CHECKPOINTS_NAME
    if not directory.is_dir():
        return False
    names = [checkpoint.name for checkpoint in list_checkpoints(list_names(LOCAL_FILESYSTEM, directory))]
    return any(_starts_with(directory / name / MANIFEST_NAME, MANIFEST_START) for name in names)


def _starts_with(path: Path, start: bytes) -> bool:
    entry = LOCAL_FILESYSTEM.entry(path) if path.parent.is_dir() else None
    if entry is None or entry.kind != "file":
        return False
    return next(iter(read_chunks(LOCAL_FILESYSTEM, path)), b"").startswith(start)


def _is_nobodys(path: Path) -> bool:
    """What can be there without anybody's work in it: empty folders, and the lock file of a start that was killed."""
    if path.name in _OF_THE_FILESYSTEM:
        return True
    if path.is_dir():
        return not os.listdir(path)
    entry = LOCAL_FILESYSTEM.entry(path)
    return path.name == LOCK_NAME and entry is not None and entry.kind == "file" and entry.size == 0
