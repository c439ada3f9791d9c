"""Whether a checkpoint is intact. Reads only."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import (
    Filesystem,
    UnusableFileError,
    describe_os_error,
    hash_file,
    is_unreadable,
    read_file,
    regular_file_size,
    wait_for_directory,
)
from qwen3next_train.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    NewerFormatError,
    parse_manifest,
)
from qwen3next_train.checkpoint.names import MANIFEST_NAME, CheckpointInfo
from qwen3next_train.checkpoint.threads import by_threads, num_threads
from qwen3next_train.errors import CheckpointError


@dataclass(frozen=True)
class VerifyResult:
    """What one rank found when it checked its share of a checkpoint.

    Args:
        reason: what is wrong, None for nothing.
        manifest: None when it is the manifest that is wrong.
        newer: intact, but written by a newer version of the program.
        unreadable: it may be intact, but the system does not let it be read now (permission, device, limits).
    """

    reason: str | None
    manifest: Manifest | None = None
    newer: bool = False
    unreadable: bool = False


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
    except OSError as error:
        # It has just been listed.
        return VerifyResult(describe_os_error(error), unreadable=True)
    manifest = None
    try:
        entry = fs.entry(path)
        if entry is None or entry.kind != "directory":
            return VerifyResult(f"is a {entry.kind if entry else 'missing directory'}, not a directory")
        manifest = _read_manifest(fs, path, checkpoint.step)
        share = manifest.files[rank::world_size]
        threads = num_threads(sum(file.size for file in share)) if hashes else 1
        enough = threading.Event()
        reasons = by_threads(
            lambda file: _file_error(fs, path, file, hashes=hashes, enough=enough), share, threads, enough=enough
        )
        for file, reason in zip(share, reasons, strict=True):
            if reason:
                return VerifyResult(f"{file.name} {reason}", manifest)
    except NewerFormatError as error:
        return VerifyResult(str(error), newer=True)
    except CheckpointError as error:
        return VerifyResult(str(error))
    except OSError as error:
        return VerifyResult(describe_os_error(error), manifest, unreadable=is_unreadable(error))
    return VerifyResult(None, manifest)


def _read_manifest(fs: Filesystem, path: Path, step: int) -> Manifest:
    try:
        raw = read_file(fs, path / MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except UnusableFileError as error:
        raise CheckpointError(f"{MANIFEST_NAME} {error}") from error
    return parse_manifest(raw, step=step)


def _file_error(fs: Filesystem, path: Path, file: FileEntry, *, hashes: bool, enough: threading.Event) -> str | None:
    try:
        size = regular_file_size(fs, path / file.name)
    except UnusableFileError as error:
        return str(error)
    if size != file.size:
        return f"has {size} bytes instead of {file.size}"
    if hashes and hash_file(fs, path / file.name, enough) != file.xxh3_128:
        return "does not match its hash"
    return None
