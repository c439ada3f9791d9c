"""Finds the files of a folder or glob, and accounts for those that are not read.

Links are followed. A link to a folder that it lies in would never end and is an error; what has several names, by
links of either kind, is read once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qwen3next_train.errors import DataError

_Identity = tuple[int, int]


@dataclass(frozen=True)
class SourceFile:
    """One file to read documents from.

    Args:
        name: path relative to what the user named, ``/`` between parts; decides where a text file is held out.
        path: where it lies.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class PassedOver:
    """Files of a source that are not read, all for one reason.

    Args:
        reason: why, or the suffix that is not read.
        num_files: how many.
        num_bytes: their size, 0 where it cannot be known.
        example: name of the first of them.
    """

    reason: str
    num_files: int
    num_bytes: int
    example: str


class Collection:
    """The files found so far, each either to be read or passed over for a reason."""

    def __init__(self) -> None:
        self.files: list[SourceFile] = []
        self._passed_over: dict[str, PassedOver] = {}

    def pass_over(self, file: SourceFile, reason: str) -> None:
        """Count a file that is not read."""
        try:
            num_bytes = file.path.stat().st_size if file.path.is_file() else 0
        except OSError:
            num_bytes = 0
        found = self._passed_over.get(reason, PassedOver(reason, 0, 0, file.name))
        self._passed_over[reason] = PassedOver(reason, found.num_files + 1, found.num_bytes + num_bytes, found.example)

    def pass_over_where(self, reason: Callable[[SourceFile], str | None]) -> None:
        """Pass over the files for which there is a reason."""
        files, self.files = self.files, []
        for file in files:
            why = reason(file)
            if why is None:
                self.files.append(file)
            else:
                self.pass_over(file, why)

    def pass_over_repeated(self) -> None:
        """Pass over files that are read under another name: first come names that are no links, then the order."""
        names: dict[_Identity, list[SourceFile]] = {}
        for file in self.files:
            with suppress(OSError):  # gone since; that is said when it is read
                names.setdefault(_identity(file.path.stat()), []).append(file)
        repeated: set[SourceFile] = set()
        for files in names.values():
            if len(files) > 1:
                repeated.update(sorted(files, key=lambda file: (file.path.is_symlink(), _order(file)))[1:])
        if repeated:
            self.pass_over_where(lambda file: "links to files that are read already" if file in repeated else None)

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        """What is not read, by reason."""
        return tuple(self._passed_over[reason] for reason in sorted(self._passed_over))


def collect_folder(root: Path) -> Collection:
    """All files below a folder, sorted by name; hidden ones (``.git``) are passed over.

    Raises:
        DataError: a link leads back to a folder that it lies in.
        OSError: the folder cannot be read.
    """
    return _Search(root, counts_hidden=True).run(("**",))


def collect_glob(root: Path, pattern: Sequence[str]) -> Collection:
    """The files that a pattern names, sorted by name.

    Args:
        root: the folder the pattern begins in.
        pattern: its parts, as a shell understands them; ``**`` is any number of folders, at the end all files in them.
            A part such as ``data[1]`` is a name where there is one.

    Raises:
        DataError: as :func:`collect_folder`.
        OSError: as :func:`collect_folder`.
    """
    return _Search(root, counts_hidden=False).run(tuple(pattern))


@dataclass(frozen=True)
class _Folder:
    """A folder to look into, with those on the way to it, for the rest of the pattern."""

    file: SourceFile
    ancestors: tuple[_Identity, ...]
    pattern: tuple[str, ...]


class _Search:
    def __init__(self, root: Path, *, counts_hidden: bool) -> None:
        self._root = root
        self._counts_hidden = counts_hidden
        self._found = Collection()
        self._names: set[str] = set()
        self._visited: set[tuple[_Identity, tuple[str, ...]]] = set()
        self._folders: list[_Folder] = []
        # Looked at last, so that what lies here is read under its own name.
        self._linked_folders: list[_Folder] = []

    def run(self, pattern: tuple[str, ...]) -> Collection:
        os.scandir(self._root).close()
        self._folders.append(_Folder(SourceFile("", self._root), (_identity(self._root.stat()),), pattern))
        while self._folders or self._linked_folders:
            folder = self._folders.pop() if self._folders else self._linked_folders.pop(0)
            key = folder.ancestors[-1], folder.pattern
            if key in self._visited:
                self._found.pass_over(folder.file, "links to folders that are read already")
            else:
                self._visited.add(key)
                self._look_into(folder, folder.pattern)
        self._found.files.sort(key=_order)
        return self._found

    def _look_into(self, folder: _Folder, pattern: tuple[str, ...]) -> None:
        head, rest = pattern[0], pattern[1:]
        if head == "**" and rest:
            self._look_into(folder, rest)
        try:
            with os.scandir(folder.file.path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError:
            self._found.pass_over(folder.file, "unreadable folders")
            return
        is_name = not matches_itself(head) and any(entry.name == head for entry in entries)
        for entry in entries:
            file = SourceFile(f"{folder.file.name}/{entry.name}".removeprefix("/"), Path(entry.path))
            if entry.name.startswith(".") and not head.startswith("."):
                if self._counts_hidden:
                    self._count_hidden(file)
            elif head == "**":
                if file.path.is_dir():
                    self._descend(folder, file, pattern)
                elif not rest:
                    self._take(file)
            elif entry.name == head if is_name else fnmatchcase(entry.name, head):
                if not rest:
                    self._take(file)
                elif file.path.is_dir():
                    self._descend(folder, file, rest)

    def _descend(self, folder: _Folder, file: SourceFile, pattern: tuple[str, ...]) -> None:
        try:
            identity = _identity(file.path.stat())
        except OSError:
            self._found.pass_over(file, "unreadable folders")
            return
        if identity in folder.ancestors:
            raise DataError(f"{file.path}: a link to {file.path.resolve()}, a folder that it lies in; remove the link")
        below = _Folder(file, (*folder.ancestors, identity), pattern)
        (self._linked_folders if file.path.is_symlink() else self._folders).append(below)

    def _take(self, file: SourceFile) -> None:
        if file.name not in self._names:
            self._names.add(file.name)
            self._add(file)

    def _add(self, file: SourceFile) -> None:
        try:
            status = file.path.stat()
        except OSError:
            self._found.pass_over(file, "broken links" if file.path.is_symlink() else "unreadable files")
            return
        if stat.S_ISDIR(status.st_mode):
            self._found.pass_over(file, "folders")
        elif not stat.S_ISREG(status.st_mode):
            self._found.pass_over(file, "special files")
        elif not os.access(file.path, os.R_OK):
            self._found.pass_over(file, "unreadable files")
        else:
            self._found.files.append(file)

    def _count_hidden(self, file: SourceFile) -> None:
        """Count a hidden file, or all files in a hidden folder; links are not followed."""
        if file.path.is_symlink() or not file.path.is_dir():
            self._found.pass_over(file, "hidden files")
            return
        for folder, _, names in os.walk(file.path):
            for name in names:
                path = Path(folder, name)
                self._found.pass_over(SourceFile(path.relative_to(self._root).as_posix(), path), "hidden files")


def matches_itself(pattern: str) -> bool:
    """Whether a part of a pattern matches its own text, as ``*.txt`` does and ``data[1]`` does not.

    What does not is taken for a name where a file or folder has it.
    """
    return fnmatchcase(pattern, pattern)


def _order(file: SourceFile) -> list[str]:
    return file.name.split("/")


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
