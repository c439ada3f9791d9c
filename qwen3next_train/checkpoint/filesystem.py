"""Every file operation of the checkpoint layer, behind one object.

The primitives are methods so that a test can hand in a filesystem that counts, cuts or fails any of them;
everything larger (writing a whole file, removing a tree) is a function made of primitives. Nothing here follows
a symbolic link in the last component of a path, and nothing is ever opened for writing that already exists.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import xxhash

from qwen3next_train.exhaustion import system_reason
from qwen3next_train.files import NO_SUCH_FILE, sync_directory

FileKind = Literal["file", "directory", "symbolic link", "special file"]

READ_CHUNK_BYTES = 4 << 20

_FILE_MODE = 0o640
_DIRECTORY_MODE = 0o750


@dataclass(frozen=True)
class Entry:
    """What ``lstat`` says of a name.

    Args:
        kind: what the name itself is; a link is a link, whatever it points to.
        size: length in bytes.
    """

    kind: FileKind
    size: int


class Filesystem(Protocol):
    """The primitives. All raise ``OSError``."""

    def entry(self, path: Path) -> Entry | None:
        """What is at ``path``, None for nothing."""

    def list_dir(self, path: Path) -> list[str]:
        """Names in a directory, unordered."""

    def make_dir(self, path: Path) -> None:
        """Create one directory that must not exist."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist; returns a descriptor for writing."""

    def open(self, path: Path) -> int:
        """Open an existing file; returns a descriptor for reading."""

    def read(self, descriptor: int, num_bytes: int) -> bytes:
        """At most ``num_bytes`` from the current position, empty at the end."""

    def write(self, descriptor: int, data: memoryview | bytes) -> None:
        """Append all of ``data``."""

    def fsync(self, descriptor: int) -> None:
        """Force a file's content to the device."""

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""

    def fsync_dir(self, path: Path) -> None:
        """Force a directory's names to the device."""

    def rename(self, source: Path, target: Path) -> None:
        """Move a name within one filesystem, atomically; replaces a file, never a non-empty directory."""

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""

    def free_bytes(self, path: Path) -> int:
        """Bytes this user may still write on the filesystem of ``path``."""


class LocalFilesystem:
    """The operating system's files."""

    def entry(self, path: Path) -> Entry | None:
        """What is at ``path``, None for nothing."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        return Entry(_kind(status.st_mode), status.st_size)

    def list_dir(self, path: Path) -> list[str]:
        """Names in a directory, unordered."""
        return os.listdir(path)

    def make_dir(self, path: Path) -> None:
        """Create one directory that must not exist."""
        os.mkdir(path, _DIRECTORY_MODE)

    def create(self, path: Path) -> int:
        """Create a file that must not exist; returns a descriptor for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)

    def open(self, path: Path) -> int:
        """Open an existing file; returns a descriptor for reading."""
        # Without O_NONBLOCK, opening a planted named pipe would wait for a writer for ever.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self, descriptor: int, num_bytes: int) -> bytes:
        """At most ``num_bytes`` from the current position, empty at the end."""
        return os.read(descriptor, num_bytes)

    def write(self, descriptor: int, data: memoryview | bytes) -> None:
        """Append all of ``data``."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def fsync(self, descriptor: int) -> None:
        """Force a file's content to the device."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def fsync_dir(self, path: Path) -> None:
        """Force a directory's names to the device."""
        sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Move a name within one filesystem, atomically; replaces a file, never a non-empty directory."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes this user may still write on the filesystem of ``path``."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


LOCAL_FILESYSTEM = LocalFilesystem()


class UnusableFileError(Exception):
    """A name that holds no usable file; the text is the reason, to follow the name."""


def make_dirs(fs: Filesystem, path: Path) -> None:
    """Create ``path`` and its missing parents, each one durable before the next."""
    if fs.entry(path) is not None:
        return
    make_dirs(fs, path.parent)
    fs.make_dir(path)
    fs.fsync_dir(path.parent)


@contextmanager
def created_file(fs: Filesystem, path: Path) -> Iterator[int]:
    """A descriptor for writing a new file, which is forced to the device at the end and closed in any case."""
    with _naming(path):
        descriptor = fs.create(path)
        try:
            yield descriptor
            fs.fsync(descriptor)
        finally:
            fs.close(descriptor)


def write_file(fs: Filesystem, path: Path, data: bytes) -> None:
    """Create ``path`` with ``data`` and force it to the device."""
    with created_file(fs, path) as descriptor:
        fs.write(descriptor, data)


def read_chunks(fs: Filesystem, path: Path) -> Iterator[bytes]:
    """The content of a file, piece by piece."""
    with _naming(path):
        descriptor = fs.open(path)
        try:
            while chunk := fs.read(descriptor, READ_CHUNK_BYTES):
                yield chunk
        finally:
            fs.close(descriptor)


def regular_file_size(fs: Filesystem, path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        UnusableFileError: nothing is there, or something else than a regular file.
        OSError: the name cannot be looked up.
    """
    entry = fs.entry(path)
    if entry is None:
        raise UnusableFileError("is missing")
    if entry.kind != "file":
        raise UnusableFileError(f"is a {entry.kind}, not a regular file")
    return entry.size


def read_file(fs: Filesystem, path: Path, *, max_bytes: int) -> bytes:
    """The content of a small file.

    Raises:
        UnusableFileError: as :func:`regular_file_size`, or larger than ``max_bytes``.
        OSError: it cannot be read.
    """
    size = regular_file_size(fs, path)
    if size > max_bytes:
        raise UnusableFileError(f"has {size} bytes, more than {max_bytes}")
    return b"".join(read_chunks(fs, path))


def is_unreadable(error: OSError) -> bool:
    """Whether an error says that something cannot be read now, not that it is missing or something else.

    The content may be intact then: it is neither passed over nor replaced.
    """
    return error.errno not in NO_SUCH_FILE


def hash_file(fs: Filesystem, path: Path, enough: threading.Event | None = None) -> str:
    """xxh3-128 of a file's content as 32 hexadecimal digits; of its beginning once ``enough`` is set."""
    digest = xxhash.xxh3_128()
    for chunk in read_chunks(fs, path):
        if enough is not None and enough.is_set():
            break
        digest.update(chunk)
    return digest.hexdigest()


def remove_tree(fs: Filesystem, path: Path) -> None:
    """Remove whatever is at ``path``; links are removed, not followed; nothing there is fine."""
    entry = fs.entry(path)
    if entry is None:
        return
    if entry.kind != "directory":
        fs.unlink(path)
        return
    for name in sorted(fs.list_dir(path)):
        remove_tree(fs, path / name)
    fs.remove_dir(path)


def wait_for_directory(fs: Filesystem, path: Path, *, timeout_s: float) -> None:
    """Wait until a directory that another node has created is visible here (network filesystems cache names).

    Raises:
        FileNotFoundError: when it is not there after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while fs.entry(path) is None:
        if time.monotonic() >= deadline:
            raise FileNotFoundError(
                errno.ENOENT,
                "not visible on this node; run.dir must be on a filesystem that all ranks share",
                str(path),
            )
        time.sleep(0.05)


def describe_os_error(error: OSError) -> str:
    """One line for an ``OSError``: the file it concerns, if known, and the system's reason."""
    reason = system_reason(error)
    return f"{Path(os.fsdecode(error.filename)).name}: {reason}" if error.filename else reason


def format_bytes(num_bytes: int) -> str:
    """A size for people, in binary units."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.2f} {unit}"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of calls on descriptors, which know no name, the file they concern."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _kind(mode: int) -> FileKind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symbolic link" if stat.S_ISLNK(mode) else "special file"
