"""Rank 0's part in saving: staging directory, publication by rename, retention. No collectives here.

Order on disk: every file is written and synced, then the manifest, then the staging directory; an older
checkpoint of the same step is renamed aside (never overwritten), the staging directory is renamed to its final
name - the one commit point - and the parent directory is synced. Only then is anything deleted.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import Filesystem, remove_tree, write_file
from qwen3next_train.checkpoint.names import (
    BEST_NAME,
    MANIFEST_NAME,
    is_leftover,
    is_unfinished,
    list_checkpoints,
    list_names,
    step_name,
)
from qwen3next_train.log import get_logger

LATEST_NAME = "latest"
ASIDE_NAME = "aside"
"""Of the folders, with a number, in which the checkpoints are that a run went back from."""


def staging_name(step: int) -> str:
    """A new name for the staging directory of a step."""
    return _hidden_name("tmp", step_name(step))


def create_staging(fs: Filesystem, directory: Path, name: str) -> None:
    """Create the staging directory, and the checkpoints directory when it is the first.

    Nothing above it is created: a run directory that is gone does not come back as an empty one.
    """
    if fs.entry(directory) is None:
        fs.make_dir(directory)
        fs.fsync_dir(directory.parent)
    fs.make_dir(directory / name)


def publish(fs: Filesystem, directory: Path, staging: str, step: int, manifest: bytes) -> None:
    """Turn a complete staging directory into the checkpoint of ``step``.

    Raises:
        OSError: not published, and an older checkpoint of this step is where it was; or, when it is the last
            sync that failed, published without being sure to survive a power failure.
    """
    write_file(fs, directory / staging / MANIFEST_NAME, manifest)
    fs.fsync_dir(directory / staging)
    target = directory / step_name(step)
    replaced = directory / _hidden_name("replaced", step_name(step))
    replaces = fs.entry(target) is not None
    if replaces:
        fs.rename(target, replaced)
    try:
        fs.rename(directory / staging, target)
    except OSError:
        if replaces:
            fs.rename(replaced, target)
        raise
    fs.fsync_dir(directory)


def write_latest_hint(fs: Filesystem, directory: Path, step: int) -> None:
    """Tell people which checkpoint is the newest; the program never reads it."""
    _write_hint(fs, directory, LATEST_NAME, step)


def write_best_hint(fs: Filesystem, directory: Path, step: int | None) -> None:
    """Tell people which checkpoint is the best (``checkpoint.best``); the program asks the manifests, never this file.

    Args:
        fs: where the checkpoints are.
        directory: the checkpoints directory.
        step: None when there is none: nothing is told then.
    """
    if step is not None:
        _write_hint(fs, directory, BEST_NAME, step)
    elif fs.entry(directory / BEST_NAME) is not None:
        fs.unlink(directory / BEST_NAME)


def _write_hint(fs: Filesystem, directory: Path, name: str, step: int) -> None:
    temporary = directory / _hidden_name("tmp", step_name(step))
    write_file(fs, temporary, f"{step_name(step)}\n".encode())
    fs.rename(temporary, directory / name)


def remove_unfinished(fs: Filesystem, directory: Path) -> None:
    """Remove what interrupted saves and deletions left, as far as nothing else can hold what it holds."""
    for name in list_names(fs, directory):
        if is_unfinished(name):
            remove_tree(fs, directory / name)


def remove_leftovers(fs: Filesystem, directory: Path) -> None:
    """Remove what interrupted saves and deletions left; put back what a cut publication had moved aside."""
    names = fs.list_dir(directory)
    known = list_checkpoints(names)
    published = {checkpoint.step for checkpoint in known if checkpoint.published}
    for checkpoint in known:
        if not checkpoint.published and checkpoint.step not in published:
            fs.rename(directory / checkpoint.name, directory / step_name(checkpoint.step))
            published.add(checkpoint.step)
            names.remove(checkpoint.name)
    for name in names:
        if is_leftover(name):
            remove_tree(fs, directory / name)


def set_aside(fs: Filesystem, directory: Path, step: int) -> Path | None:
    """Move the checkpoints of steps after ``step`` to a folder of their own, in which nothing looks for checkpoints.

    Returns:
        The folder, None when there is no such checkpoint.

    Raises:
        OSError: they cannot be moved; those that are not yet moved are where they were.
    """
    names = fs.list_dir(directory)
    later = [checkpoint for checkpoint in list_checkpoints(names) if checkpoint.step > step]
    if not later:
        return None
    number = next(number for number in count(1) if f"{ASIDE_NAME}-{number}" not in names)
    aside = directory / f"{ASIDE_NAME}-{number}"
    fs.make_dir(aside)
    # The newest first: what a kill leaves behind is a run that had come less far.
    for checkpoint in later:
        fs.rename(directory / checkpoint.name, aside / checkpoint.name.lstrip("."))
    fs.fsync_dir(aside)
    fs.fsync_dir(directory)
    return aside


def delete(fs: Filesystem, directory: Path, names: Iterable[str]) -> None:
    """Delete published checkpoints; each loses its name before its content."""
    stale = {name: _hidden_name("trash", name) for name in names}
    for name, trash in stale.items():
        fs.rename(directory / name, directory / trash)
    if stale:
        fs.fsync_dir(directory)
    for name, trash in stale.items():
        remove_tree(fs, directory / trash)
        get_logger().info("checkpoint: %s deleted (checkpoint.keep)", name)


def _hidden_name(prefix: str, name: str) -> str:
    return f".{prefix}-{name}-{secrets.token_hex(4)}"
