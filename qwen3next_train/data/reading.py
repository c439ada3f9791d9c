"""Opens files that may turn out to be anything: missing, a named pipe, enormous, on a disk that fails.

Unreadable is not damaged: what cannot be read now (permission, a failing disk, a stale handle, no descriptors left)
may be intact, so it is a :class:`StorageError` and nobody replaces it. A missing file, or something else under its
name, is a :class:`DataError`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from qwen3next_train.errors import DataError, StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.files import NO_SUCH_FILE

# Nobody looks a name up before it is opened: it may be one that no file can have, or a socket.
_NOT_THERE = NO_SUCH_FILE | {errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV}
_READ_BYTES = 4 << 20


def read_error(path: Path, error: OSError) -> DataError | StorageError:
    """The one-line error for a file that cannot be opened or read."""
    reason = system_reason(error)
    if error.errno in _NOT_THERE:
        return DataError(f"{path}: cannot be read ({reason}); put the file there")
    return StorageError(
        f"{path}: cannot be read ({reason}); it may be intact and was left alone, run again when it can"
    )


def open_regular(path: Path) -> int:
    """Open a regular file for reading; returns a descriptor.

    Raises:
        DataError: there is none.
        StorageError: it cannot be read now.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise read_error(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: cannot be read (not a regular file); put the file there")
    return descriptor


def read_at(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    """Bytes ``[offset, offset + size)`` of an open file, fewer at its end.

    Raises:
        StorageError: it cannot be read.
    """
    pieces = []
    try:
        while size and (piece := os.pread(descriptor, min(size, _READ_BYTES), offset)):
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
    except OSError as error:
        raise StorageError(f"{path}: cannot read at byte {offset} ({system_reason(error)})") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_small_file(path: Path, *, max_bytes: int) -> bytes:
    """All of a file that has no reason to be large.

    Raises:
        DataError: there is no regular file, or it has more than ``max_bytes``.
        StorageError: it cannot be read now.
    """
    descriptor = open_regular(path)
    try:
        content = read_at(descriptor, path, 0, max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes} bytes; it is not what its name says")
    return content


def remove(path: Path) -> None:
    """Remove whatever has this name, a folder with all it holds; nothing to do when nothing has.

    Raises:
        OSError: when that fails.
    """
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        shutil.rmtree(path)


def is_missing(path: Path) -> bool:
    """Whether nothing has this name, not even a broken link.

    Raises:
        StorageError: that cannot be found out now.
    """
    try:
        path.lstat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return True
        raise read_error(path, error) from None
    return False
