"""What the operating system's files do and say, where several packages rely on it: locks, names, errors."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What ``flock`` says on a filesystem without locks."""

NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""What ``link`` says where there cannot be a hard link."""

NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""What ``open`` says of a name with nothing behind it, or something else than a file. After any other error the file
may be intact: it cannot be read now (permission, a failing disk, a stale handle, no descriptors left)."""


def lock_now(descriptor: int, unsupported: frozenset[int] = NO_LOCKS) -> bool:
    """Lock an open file or directory for this process alone, without waiting for another one.

    Args:
        descriptor: what is open; closing it gives the lock back.
        unsupported: errors that say that nobody can lock it.

    Returns:
        Whether it is locked now; False where it cannot be.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be locked, for none of the reasons in ``unsupported``.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in unsupported:
            raise
        return False
    return True


def sync_directory(path: Path) -> None:
    """Force a directory's names (after a rename) to the device.

    Raises:
        OSError: that failed, or there is no such directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
