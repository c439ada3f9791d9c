"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import Filesystem, describe_os_error, format_bytes, make_dirs, remove_tree
from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.log import get_logger


@contextmanager
def staged_folder(fs: Filesystem, output: Path, *, what: str, num_bytes: int) -> Iterator[Path]:
    """A new folder beside ``output`` that becomes ``output`` by one rename when the block ends without an exception.

    Otherwise it is removed, and nothing is left behind.

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
    try:
        make_dirs(fs, output.parent)
        free = fs.free_bytes(output.parent)
        if free < num_bytes:
            raise StorageError(
                f"{what}: {output.parent}: {format_bytes(num_bytes)} needed, {format_bytes(free)} available; "
                "free space or choose another output"
            )
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
        _discard(fs, staging)


def _require_absent(fs: Filesystem, output: Path, what: str) -> None:
    try:
        exists = fs.entry(output) is not None
    except OSError as error:
        raise StorageError(f"{what}: {output}: {describe_os_error(error)}; choose another output") from error
    if exists:
        raise ConfigError(f"{what}: {output} exists; remove it or choose another output")


def _discard(fs: Filesystem, staging: Path) -> None:
    try:
        remove_tree(fs, staging)
    except OSError as error:
        get_logger().warning("could not remove %s: %s", staging, describe_os_error(error))
