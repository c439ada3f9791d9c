"""``tokenize --output``: writes a store where the user wants it, goes on after a kill, never replaces a file.

The store grows in ``.NAME-<key>.partial`` beside the output, whose file ``lock`` is locked meanwhile. Its finished
files get their names by hard links, which fail where a name is taken; ``.idx``, which makes the store readable, comes
last. A name is its own when it leads to the very file in the partial folder, left by a kill between two links. Partial
folders that nobody has locked are removed by the next ``tokenize`` into the same folder, whatever it is called.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3next_train.data.reading import is_missing, read_error
from qwen3next_train.data.store_cache import can_go_on_after
from qwen3next_train.data.store_meta import entry_name
from qwen3next_train.data.store_writer import storage_errors
from qwen3next_train.data.token_store import TokenStore, store_paths
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.files import NO_HARD_LINKS, lock_now, sync_directory
from qwen3next_train.log import get_logger

_PARTIAL_NAME = re.compile(r"\.(?P<name>.+)-[0-9a-f]{32}\.partial", re.DOTALL)
_REMOVED_NAME = re.compile(r"\..+-[0-9a-f]{32}\.removed", re.DOTALL)
_STORE_NAME = "train"


def require_unused(prefix: Path) -> None:
    """Reject an output whose names are taken by files that an interrupted ``tokenize`` of this name has not put there.

    Raises:
        ConfigError: a file exists.
        StorageError: the folder cannot be read.
    """
    paths, names = store_paths(prefix), store_paths(Path(_STORE_NAME))
    for path, name in ((paths.idx, names.idx), *zip(paths, names, strict=True)):
        if not is_missing(path) and not _is_in_a_partial_folder(path, prefix, name):
            raise ConfigError(f"tokenize: {path} exists; remove it or choose another output")


def is_written(prefix: Path, key: str) -> bool:
    """Whether the store at ``prefix`` is what :func:`write_store` writes there under this key, or looks like it.

    Raises:
        StorageError: it cannot be read now.
    """
    try:
        meta = TokenStore(prefix).meta()
    except DataError:
        return False
    return meta is not None and meta.entry == entry_name(key, _STORE_NAME, 1)


def write_store(prefix: Path, key: str, build: Callable[[Path], float]) -> float:
    """Build a store and publish it at ``prefix``.

    Args:
        prefix: path of the store without suffix.
        key: digest of everything the store depends on; 32 hexadecimal digits.
        build: writes the store of the entry ``key`` at the given prefix, in a folder in which a killed process may
            have begun, and returns the seconds it took.

    Raises:
        ConfigError: a file of the store exists, or another process is writing it.
        DataError: from ``build``.
        StorageError: the folder cannot be read or written.
    """
    require_unused(prefix)
    with storage_errors(prefix, "free space or choose another output"):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        partial = prefix.parent / f".{prefix.name}-{key}.partial"
        with _locked(partial, prefix) as locks_work:
            if locks_work:
                _remove_leftovers(prefix.parent, own=partial)
            try:
                build_s = build(partial / _STORE_NAME)
                TokenStore(partial / _STORE_NAME).check()
            except Exception as error:
                if not can_go_on_after(error):
                    _remove(partial)
                raise
            _publish(partial / _STORE_NAME, prefix)
            sync_directory(prefix.parent)
            _remove(partial)
    return build_s


def _publish(staged: Path, prefix: Path) -> None:
    sources, targets = store_paths(staged), store_paths(prefix)
    for source, target in (
        (sources.bin, targets.bin),
        (sources.hashes, targets.hashes),
        (sources.meta, targets.meta),
        (sources.idx, targets.idx),
    ):
        try:
            os.link(source, target)
        except FileExistsError:
            if not _is_same_file(source, target):
                raise ConfigError(
                    f"tokenize: {target} exists; move it away and run the same command again, the store is finished"
                ) from None
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            # A file system without hard links: a file that appears between these two lines would be lost.
            if not is_missing(target):
                raise ConfigError(f"tokenize: {target} exists; remove it or choose another output") from None
            source.rename(target)


@contextmanager
def _locked(partial: Path, prefix: Path) -> Iterator[bool]:
    """Make and lock the partial folder; False where locks do not work."""
    descriptor = -1
    while descriptor < 0:
        partial.mkdir(exist_ok=True)
        try:
            descriptor = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # somebody has removed the folder as a leftover
        try:
            is_locked = lock_now(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"tokenize: another process is writing {prefix}; wait for it or choose another output"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if is_locked and not _is_same_file(partial / "lock", descriptor):
            os.close(descriptor)
            descriptor = -1
    with _closing(descriptor):
        yield is_locked


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _partials(folder: Path) -> Iterator[tuple[Path, str]]:
    """Partial folders, each with the name of its output."""
    for path in folder.iterdir():
        match = _PARTIAL_NAME.fullmatch(path.name)
        if match is not None:
            yield path, match["name"]


def _remove_leftovers(folder: Path, *, own: Path) -> None:
    for path in folder.iterdir():
        if _REMOVED_NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for path, _ in _partials(folder):
        if path == own:
            continue
        try:
            descriptor = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            # Its maker was killed before the lock, or is just about to make it, and then makes the folder again.
            with suppress(OSError):
                path.rmdir()
            continue
        except OSError:
            continue
        with _closing(descriptor):
            try:
                is_locked = lock_now(descriptor)
            except OSError:
                continue
            if not is_locked:
                continue
            _remove(path)
            get_logger().info("%s: removed, left by a tokenize that was killed", path)


def _remove(partial: Path) -> None:
    """Remove a locked folder; under another name, so that nobody begins in it meanwhile."""
    removed = partial.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    partial.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _is_in_a_partial_folder(path: Path, prefix: Path, name: Path) -> bool:
    """Whether ``path`` is the file ``name`` that an unfinished ``tokenize`` to ``prefix`` has."""
    try:
        return any(
            _is_same_file(path, partial / name) for partial, owner in _partials(prefix.parent) if owner == prefix.name
        )
    except OSError as error:
        raise read_error(prefix.parent, error) from None


def _is_same_file(first: Path | int, second: Path | int) -> bool:
    try:
        return os.path.samestat(os.stat(first), os.stat(second))
    except OSError:
        return False
