"""Content-addressed cache of tokenised sources, safe under concurrent processes and kills at any moment.

``CACHE/<key>/`` appears by one rename of a finished directory, so it is whole or absent. A process that finds it
absent takes the lock ``CACHE/.<key>.lock`` (released by the kernel when its holder dies) and builds; the others
wait for the lock and find the directory. Staging directories that a killed process left are removed by the
next holder of the lock, and after a day by whoever builds anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.data.store_writer import staging_directory, storage_errors, sync_directory
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import DataError
from qwen3next_train.log import get_logger

# The cache may be a folder that holds other things as well.
_STAGING_NAME = re.compile(r"\.(?P<key>[0-9a-f]{32})-[a-z0-9_]+")
_ABANDONED_AFTER_S = 24 * 3600.0
_HINT = "free space or set data.cache_dir to a folder that can be written"


@dataclass(frozen=True)
class CachedStores:
    """What the cache holds for one key.

    Args:
        train: the training documents.
        validation: the held-out documents; None when there are none.
        build_s: seconds of tokenisation, None when it was there already.
    """

    train: TokenStore
    validation: TokenStore | None
    build_s: float | None


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/qwen3next_train``, else ``~/.cache/qwen3next_train``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen3next_train"


def get_or_build(cache_dir: Path, key: str, label: str, build: Callable[[Path], float]) -> CachedStores:
    """Return the stores of ``key``, building them first where they are missing or damaged.

    Args:
        cache_dir: the cache.
        key: name of the entry, a digest of everything the stores depend on.
        label: the source's name, for messages.
        build: writes ``train.*`` and perhaps ``validation.*`` into a directory and returns the seconds it took.

    Raises:
        StorageError: the cache cannot be written.
        DataError: from ``build``.
    """
    found = _open_or_report(cache_dir / key)
    if found is not None:
        return found
    with storage_errors(cache_dir, _HINT):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{key}.lock", label) as is_locked:
            found = _open_or_report(cache_dir / key)
            if found is not None:
                return found
            if is_locked:
                _remove_leftovers(cache_dir, key)
                _remove_abandoned(cache_dir)
            build_s = _build_and_publish(cache_dir, key, build)
    return _open(cache_dir / key, build_s)


def _open(directory: Path, build_s: float | None) -> CachedStores:
    train = TokenStore(directory / "train")
    has_validation = (directory / "validation.idx").exists()
    validation = TokenStore(directory / "validation") if has_validation else None
    for store in (train, validation):
        if store is not None and store.meta() is None:
            raise DataError(f"{store.meta_path}: missing; remove the folder to tokenize again")
    return CachedStores(train, validation, build_s)


def _open_or_report(directory: Path) -> CachedStores | None:
    """The entry, or None when it is absent or, which is logged, damaged."""
    if not directory.is_dir():
        return None
    try:
        return _open(directory, None)
    except DataError as error:
        get_logger().info("tokenizing again, the cache is damaged: %s", error)
        return None


def _build_and_publish(cache_dir: Path, key: str, build: Callable[[Path], float]) -> float:
    with staging_directory(cache_dir, f".{key}-") as staged:
        fresh = staged / "fresh"
        fresh.mkdir()
        build_s = build(fresh)
        sync_directory(fresh)
        if (cache_dir / key).exists():
            (cache_dir / key).rename(staged / "damaged")
        try:
            fresh.rename(cache_dir / key)
        except OSError as error:
            # Without working locks another process may have published the same content first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_directory(cache_dir)
    return build_s


def _remove_leftovers(cache_dir: Path, key: str) -> None:
    for path in cache_dir.glob(f".{key}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove old staging directories of any key that nobody is building."""
    for path in cache_dir.glob(".*-*"):
        match = _STAGING_NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            is_old = time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S
            # Whoever made the directory has made the lock as well.
            lock = os.open(cache_dir / f".{match['key']}.lock", os.O_RDWR | os.O_CLOEXEC) if is_old else None
        except OSError:
            continue
        if lock is None:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            # Being built, or locks do not work here.
            pass
        finally:
            os.close(lock)


@contextmanager
def _locked(path: Path, label: str) -> Iterator[bool]:
    """Hold the lock file; False on file systems without locks, where two builders cost time but no harm."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            get_logger().info("%s: waiting for another process that tokenizes it", label)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
