"""Content-addressed cache of tokenised sources, safe under concurrent processes and kills at any moment.

``CACHE/<key>/`` appears by one rename of a finished directory, so it is whole or absent. A process that finds it
absent takes the lock ``CACHE/.<key>.lock`` (released by the kernel when its holder dies) and builds in
``CACHE/.<key>-partial``; the others wait for the lock and find the directory. What a killed process left there, the
next holder of the lock goes on with; whoever builds anything removes it after a day, and at once when there is nothing
to go on with; the ``tokenize`` command removes it at once. An entry that turns out to be damaged, when it is opened or
later (a file ``damaged`` in it), is built again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.config.bounds import UnusableText, usable_path
from qwen3next_train.config.error_lines import show
from qwen3next_train.data.build_journal import JOURNAL_NAME
from qwen3next_train.data.reading import is_missing, read_error
from qwen3next_train.data.store_meta import entry_name
from qwen3next_train.data.store_writer import staging_directory, storage_errors
from qwen3next_train.data.token_store import TokenStore, store_paths
from qwen3next_train.errors import DataError, StoppedBySignal, StorageError
from qwen3next_train.files import lock_now, sync_directory
from qwen3next_train.log import get_logger

# The cache may be a folder that holds other things as well.
_STAGING_NAME = re.compile(r"\.(?P<key>[0-9a-f]{32})-[a-z0-9_]+")
_ABANDONED_AFTER_S = 24 * 3600.0
_DAMAGE_NOTE = "damaged"
_UNFINISHED = "fresh"
_HINT = "free space or set data.cache_dir to a folder that can be written"

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""When a disk is full, what has been written is given up: the run's own last lines need the space."""


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
    """``$XDG_CACHE_HOME/qwen3next_train``, else ``~/.cache/qwen3next_train``.

    Raises:
        StorageError: there is no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # One that depends on the working directory counts as not given, as the specification of the variable says.
        return Path(usable_path(given if given.startswith("/") else "~/.cache")) / "qwen3next_train"
    except UnusableText as error:
        raise StorageError(
            f"data.cache_dir: no home folder for its default (HOME is {show(os.environ.get('HOME'))}); set HOME, "
            "XDG_CACHE_HOME or data.cache_dir"
        ) from error


def get_or_build(
    cache_dir: Path,
    key: str,
    label: str,
    build: Callable[[Path], float],
    check: Callable[[TokenStore], None] = TokenStore.check,
) -> CachedStores:
    """Return the stores of ``key``, building them first where they are missing or damaged.

    Args:
        cache_dir: the cache.
        key: name of the entry, a digest of everything the stores depend on.
        label: the source's name, for messages.
        build: writes ``train.*`` and perhaps ``validation.*`` of the entry ``key`` into a directory, in which a killed
            process may have begun, and returns the seconds it took.
        check: looks for damage in a store that was there already; raises DataError.

    Raises:
        StorageError: the cache cannot be written, or an entry cannot be read now.
        DataError: from ``build``.
    """
    found = _open_if_whole(cache_dir / key, check, report=False)
    if found is not None:
        partial = cache_dir / f".{key}-partial"
        if os.path.lexists(partial):
            # Killed between publishing and cleaning up; nobody has a use for it now.
            _remove_unless_locked(partial, cache_dir / f".{key}.lock")
        return found
    with storage_errors(cache_dir, _HINT):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{key}.lock", label) as is_locked:
            found = _open_if_whole(cache_dir / key, check, report=True)
            if found is not None:
                return found
            if is_locked:
                _remove_abandoned(cache_dir, key)
            build_s = _build_and_publish(cache_dir, key, build, can_resume=is_locked)
    return _open(cache_dir / key, build_s)


def remove_unfinished(cache_dir: Path) -> None:
    """Remove what interrupted processes left of building, of any key, unless it is being built.

    It cannot be gone on with then; to be called when all that is needed here has been built.
    """
    for path in cache_dir.glob(".*-*"):
        match = _STAGING_NAME.fullmatch(path.name)
        if match is not None and _remove_unless_locked(path, cache_dir / f".{match['key']}.lock"):
            get_logger().info("%s: removed, left by a tokenization that was interrupted", path)


def _open(directory: Path, build_s: float | None) -> CachedStores:
    parts = ["train"]
    if not all(is_missing(path) for path in store_paths(directory / "validation")):
        parts.append("validation")
    stores = [_open_part(directory, part, len(parts)) for part in parts]
    return CachedStores(stores[0], stores[1] if len(stores) > 1 else None, build_s)


def _open_part(directory: Path, part: str, num_parts: int) -> TokenStore:
    store = TokenStore(directory / part, damage_note=directory / _DAMAGE_NOTE)
    meta, expected = store.meta(), entry_name(directory.name, part, num_parts)
    if meta is None or not store.has_hashes:
        raise DataError(f"{store.prefix}: no meta file or no hashes")
    if meta.entry != expected:
        raise DataError(f"{store.prefix}: expected the store {expected}, found {meta.entry!r}")
    return store


def _open_if_whole(directory: Path, check: Callable[[TokenStore], None], *, report: bool) -> CachedStores | None:
    """The entry, or None when it is absent or damaged, which ``report`` says.

    Raises:
        StorageError: it cannot be read now.
    """
    try:
        if not stat.S_ISDIR(directory.stat().st_mode):
            return None
    except OSError as error:
        problem = read_error(directory, error)
        if isinstance(problem, DataError):
            return None
        raise problem from None
    try:
        if not is_missing(directory / _DAMAGE_NOTE):
            raise DataError(f"{directory}: an earlier run has met damage")
        found = _open(directory, None)
        for store in (found.train, found.validation):
            if store is not None:
                check(store)
    except DataError as error:
        if report:
            get_logger().info("tokenizing again, the cache is damaged: %s", error)
        return None
    return found


def _build_and_publish(cache_dir: Path, key: str, build: Callable[[Path], float], *, can_resume: bool) -> float:
    with _building_directory(cache_dir, key, can_resume=can_resume) as staged:
        fresh = staged / _UNFINISHED
        fresh.mkdir(exist_ok=True)
        build_s = build(fresh)
        sync_directory(fresh)
        entry = cache_dir / key
        if os.path.lexists(entry):
            shutil.rmtree(staged / "damaged", ignore_errors=True)
            entry.rename(staged / "damaged")
        try:
            fresh.rename(entry)
        except OSError as error:
            # Without working locks another process may have published the same content first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_directory(cache_dir)
        (entry / JOURNAL_NAME).unlink(missing_ok=True)
    return build_s


@contextmanager
def _building_directory(cache_dir: Path, key: str, *, can_resume: bool) -> Iterator[Path]:
    """Where to build: with what an interrupted process left there, when nobody else can be building the same."""
    if not can_resume:
        with staging_directory(cache_dir, f".{key}-") as staged:
            yield staged
        return
    staged = cache_dir / f".{key}-partial"
    staged.mkdir(exist_ok=True)
    try:
        yield staged
    except Exception as error:
        if not can_go_on_after(error):
            shutil.rmtree(staged, ignore_errors=True)
        raise
    shutil.rmtree(staged, ignore_errors=True)


def can_go_on_after(error: Exception) -> bool:
    """Whether the same command may go on with what was built before this error, so that it is kept."""
    if isinstance(error, OSError):
        return error.errno not in FULL_DISK
    return isinstance(error, StoppedBySignal | StorageError)


def _remove_abandoned(cache_dir: Path, own_key: str) -> None:
    """Remove what nobody is building: what cannot be gone on with, and of other keys also what is old."""
    for path in cache_dir.glob(".*-*"):
        match = _STAGING_NAME.fullmatch(path.name)
        if path.name.startswith(f".{own_key}-"):
            if path.name != f".{own_key}-partial":
                shutil.rmtree(path, ignore_errors=True)
        elif match is not None and (_is_old(path) or not os.path.lexists(path / _UNFINISHED)):
            _remove_unless_locked(path, cache_dir / f".{match['key']}.lock")


def _is_old(directory: Path) -> bool:
    """Whether nothing in a staging directory was written for a day."""
    newest = 0.0
    for path in (directory, *directory.glob("*"), *directory.glob("*/*")):
        try:
            newest = max(newest, path.lstat().st_mtime)
        except OSError:
            continue
    return time.time() - newest > _ABANDONED_AFTER_S


def _remove_unless_locked(path: Path, lock_path: Path) -> bool:
    """Remove a staging directory that nobody builds in; False where somebody does, or locks do not work."""
    try:
        # Whoever made the directory has made the lock as well.
        lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        is_locked = lock_now(lock)
        if is_locked:
            shutil.rmtree(path, ignore_errors=True)
        return is_locked
    except OSError:
        return False
    finally:
        os.close(lock)


@contextmanager
def _locked(path: Path, label: str) -> Iterator[bool]:
    """Hold the lock file; False on file systems without locks, where two builders cost time but no harm."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            is_locked = lock_now(descriptor)
        except BlockingIOError:
            get_logger().info("%s: waiting for another process that tokenizes it", label)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_locked = True
        yield is_locked
    finally:
        os.close(descriptor)
