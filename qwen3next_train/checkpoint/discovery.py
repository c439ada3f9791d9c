"""Which checkpoints a directory holds, and whether one of them is intact. Reads only.

Names inside the checkpoints directory:

* ``step_00001000`` - published;
* ``.replaced-step_00001000-1a2b3c4d`` - published earlier and moved aside while the same step was published
  again. Between those two renames it is the only one of its step, so it counts as a checkpoint too;
* ``.tmp-step_...`` being written, ``.trash-step_...`` being deleted - not checkpoints.

Time stamps and the ``latest`` hint are never consulted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import (
    Filesystem,
    describe_os_error,
    hash_file,
    read_chunks,
    wait_for_directory,
)
from qwen3next_train.checkpoint.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    NewerFormatError,
    parse_manifest,
)
from qwen3next_train.errors import CheckpointError

_PUBLISHED = re.compile(r"step_([0-9]{8})")
_REPLACED = re.compile(r"\.replaced-step_([0-9]{8})-[0-9a-f]{8}")
_LEFTOVER = re.compile(r"\.(?:tmp|trash|replaced)-step_[0-9]{8}-[0-9a-f]{8}")
MAX_STEP = 10**8 - 1


@dataclass(frozen=True)
class CheckpointInfo:
    """A name that may be a checkpoint.

    Args:
        name: in the checkpoints directory.
        step: as the name says.
        published: not one that was moved aside.
    """

    name: str
    step: int
    published: bool


@dataclass(frozen=True)
class VerifyResult:
    """What one rank found when it checked its share of a checkpoint.

    Args:
        reason: what is wrong, None for nothing.
        manifest: None when it is the manifest that is wrong.
        newer: intact, but written by a newer version of the program.
    """

    reason: str | None
    manifest: Manifest | None = None
    newer: bool = False


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step_{step:08d}"


def list_names(fs: Filesystem, directory: Path) -> list[str]:
    """Names in the checkpoints directory, none when it does not exist (yet)."""
    return [] if fs.entry(directory) is None else fs.list_dir(directory)


def list_checkpoints(names: Iterable[str]) -> list[CheckpointInfo]:
    """The checkpoints among directory names, newest step first, a published one before one moved aside."""
    found = []
    for name in names:
        if match := _PUBLISHED.fullmatch(name):
            found.append(CheckpointInfo(name, int(match[1]), published=True))
        elif match := _REPLACED.fullmatch(name):
            found.append(CheckpointInfo(name, int(match[1]), published=False))
    return sorted(found, key=lambda checkpoint: (-checkpoint.step, not checkpoint.published, checkpoint.name))


def is_leftover(name: str) -> bool:
    """Whether a name is one that only an interrupted save or deletion leaves behind."""
    return _LEFTOVER.fullmatch(name) is not None


def verify(
    fs: Filesystem,
    directory: Path,
    checkpoint: CheckpointInfo,
    *,
    rank: int = 0,
    world_size: int = 1,
    hashes: bool = True,
    timeout_s: float = 0.0,
) -> VerifyResult:
    """Check a checkpoint's manifest and every ``world_size``-th of its files.

    Args:
        fs: where it lies.
        directory: the checkpoints directory.
        checkpoint: what to check.
        rank: which share of the files.
        world_size: number of shares.
        hashes: also read and hash the files, not just compare sizes.
        timeout_s: how long to wait for the directory to become visible here.
    """
    path = directory / checkpoint.name
    try:
        wait_for_directory(fs, path, timeout_s=timeout_s)
        entry = fs.entry(path)
        if entry is None or entry.kind != "directory":
            return VerifyResult(f"is a {entry.kind if entry else 'missing directory'}, not a directory")
        manifest = _read_manifest(fs, path, checkpoint.step)
    except NewerFormatError as error:
        return VerifyResult(str(error), newer=True)
    except CheckpointError as error:
        return VerifyResult(str(error))
    except OSError as error:
        return VerifyResult(describe_os_error(error))
    for file in manifest.files[rank::world_size]:
        if reason := _file_error(fs, path, file, hashes=hashes):
            return VerifyResult(f"{file.name} {reason}", manifest)
    return VerifyResult(None, manifest)


def _read_manifest(fs: Filesystem, path: Path, step: int) -> Manifest:
    entry = fs.entry(path / MANIFEST_NAME)
    if entry is None:
        raise CheckpointError(f"{MANIFEST_NAME} is missing")
    if entry.kind != "file":
        raise CheckpointError(f"{MANIFEST_NAME} is a {entry.kind}, not a regular file")
    if entry.size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{MANIFEST_NAME} has {entry.size} bytes, more than {MAX_MANIFEST_BYTES}")
    return parse_manifest(b"".join(read_chunks(fs, path / MANIFEST_NAME)), step=step)


def _file_error(fs: Filesystem, path: Path, file: FileEntry, *, hashes: bool) -> str | None:
    try:
        entry = fs.entry(path / file.name)
        if entry is None:
            return "is missing"
        if entry.kind != "file":
            return f"is a {entry.kind}, not a regular file"
        if entry.size != file.size:
            return f"has {entry.size} bytes instead of {file.size}"
        if hashes and hash_file(fs, path / file.name) != file.xxh3_128:
            return "does not match its hash"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
