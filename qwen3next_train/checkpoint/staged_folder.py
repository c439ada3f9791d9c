"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import (
    Filesystem,
    describe_os_error,
    format_bytes,
    make_dirs,
    remove_tree,
)
from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.files import NO_LOCKS, lock_now
from qwen3next_train.log import get_logger

_LOCK_SUFFIX = ".lock"
_LOCK_NAME = re.compile(r"\.tmp-.+-[0-9a-f]{8}\.lock", re.DOTALL)


@contextmanager
def staged_folder(fs: Filesystem, output: Path, *, what: str, num_bytes: int) -> Iterator[Path]:
    """A new folder beside ``output`` that becomes ``output`` by one rename when the block ends without an exception.

    Otherwise it is removed, and nothing is left behind; what a killed process left beside ``output``, under whatever
    name, is removed by the next one. A lock file beside each such folder, made before and removed after it, says that
    its process lives.

    Args:
        fs: where it lies.
        output: its final name, which must not exist.
        what: the operation, which begins every error line.
        num_bytes: what will be written, roughly.

    Raises:
        ConfigError: ``output`` exists.
        StorageError: too little space, or an ``OSError`` of the block.
    """
    output = Path(os.path.abspath(output))
    _require_absent(fs, output, what)
    staging = output.parent / f".tmp-{output.name}-{secrets.token_hex(4)}"
    lock = -1
    try:
        make_dirs(fs, output.parent)
        _remove_leftovers(fs, output.parent)
        free = fs.free_bytes(output.parent)
        if free < num_bytes:
            raise StorageError(
                f"{what}: {output.parent}: {format_bytes(num_bytes)} needed, {format_bytes(free)} available; "
                "free space or choose another output"
            )
        lock = _open_lock(_lock_of(staging), os.O_CREAT | os.O_EXCL)
        fs.make_dir(staging)
        yield staging
        fs.fsync_dir(staging)
        # The rename would replace an empty folder that somebody has made since.
        _require_absent(fs, output, what)
        fs.rename(staging, output)
        fs.fsync_dir(output.parent)
    except OSError as error:
        raise StorageError(
            f"{what}: {output}: cannot be written ({describe_os_error(error)}); free space or choose another output"
        ) from error
    finally:
        if lock >= 0:
            _discard(fs, staging)
            os.close(lock)


def _require_absent(fs: Filesystem, output: Path, what: str) -> None:
    try:
        exists = fs.entry(output) is not None
    except OSError as error:
        raise StorageError(f"{what}: {output}: {describe_os_error(error)}; choose another output") from error
    if exists:
        raise ConfigError(f"{what}: {output} exists; remove it or choose another output")


def _lock_of(staging: Path) -> Path:
    return staging.with_name(staging.name + _LOCK_SUFFIX)


def _open_lock(path: Path, flags: int = 0) -> int:
    """Open and lock a file; on a filesystem without locks, a new one is opened alone and never counts as left over.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be opened or locked.
    """
    descriptor = os.open(path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
    try:
        lock_now(descriptor, NO_LOCKS if flags & os.O_CREAT else frozenset())
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(fs: Filesystem, parent: Path) -> None:
    for name in fs.list_dir(parent):
        if not _LOCK_NAME.fullmatch(name):
            continue
        try:
            lock = _open_lock(parent / name)
        except OSError:
            # Its process lives, or it is not ours.
            continue
        try:
            _discard(fs, parent / name.removesuffix(_LOCK_SUFFIX))
        finally:
            os.close(lock)


def _discard(fs: Filesystem, staging: Path) -> None:
    try:
        remove_tree(fs, staging)
        remove_tree(fs, _lock_of(staging))
    except OSError as error:
        get_logger().warning("could not remove %s: %s", staging, describe_os_error(error))
