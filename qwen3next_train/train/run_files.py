"""Files of the run directory that are replaced as a whole: a reader sees the old or the new one, also after a kill."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, write_file
from qwen3next_train.files import NO_HARD_LINKS

WRITABLE_NAME = ".writable"
"""Made and removed to see whether files can be made."""

MAX_EXIT_BYTES = 1 << 20
"""A larger ``exit.json`` is not what its name says."""

_STAGED = re.compile(r"\.staged-[0-9]+-[0-9]+-(?:config\.yaml|run\.json|exit\.json|\.writable)")


class RunFiles:
    """Writes files of a directory.

    Args:
        path: the directory.
        rank: this process; several ranks may write the same file.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path = path
        self._rank = rank

    def replace(self, name: str, data: bytes) -> None:
        """Give a file new content.

        Raises:
            OSError: it cannot be written; the old file is untouched.
        """
        LOCAL_FILESYSTEM.rename(self._stage(name, data), self._path / name)
        LOCAL_FILESYSTEM.fsync_dir(self._path)

    def create(self, name: str, data: bytes) -> None:
        """Publish a whole file unless there is one: the first wins.

        Raises:
            FileExistsError: there is one.
            OSError: it cannot be written.
        """
        staged = self._stage(name, data)
        target = self._path / name
        try:
            # A hard link fails where a rename would replace.
            os.link(staged, target)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            staged.rename(target)
        finally:
            staged.unlink(missing_ok=True)
        LOCAL_FILESYSTEM.fsync_dir(self._path)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left of their writing; other files of like names are somebody else's.

        Raises:
            OSError: they cannot be removed.
        """
        for name in os.listdir(self._path):
            if _STAGED.fullmatch(name):
                (self._path / name).unlink(missing_ok=True)

    def _stage(self, name: str, data: bytes) -> Path:
        staged = self._path / f".staged-{self._rank}-{os.getpid()}-{name}"
        staged.unlink(missing_ok=True)
        try:
            write_file(LOCAL_FILESYSTEM, staged, data)
        except OSError as error:
            staged.unlink(missing_ok=True)
            # Under the name people know.
            raise OSError(error.errno, error.strerror, str(self._path / name)) from error
        return staged
