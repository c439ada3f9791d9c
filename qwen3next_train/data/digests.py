"""Digests of the content of source files, remembered while size and modification time stay the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b, file_digest
from pathlib import Path

from qwen3next_train.data.folders import SourceFile
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import DataError

DIGEST_BYTES = 16
_SETTLED_NS = 2_000_000_000
"""A younger file may change again within one tick of its file system's clock, so its digest is not remembered."""

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def digest_of(*parts: object) -> str:
    """Digest of a JSON-able value."""
    return blake2b(json.dumps(parts).encode(), digest_size=DIGEST_BYTES).hexdigest()


def digest_files(files: Sequence[SourceFile], cache_dir: Path) -> str:
    """Digest over names and contents of files.

    Args:
        files: the files, in order.
        cache_dir: folder in which single files' digests are remembered by path, size and modification time;
            a folder that cannot be written only costs time.

    Raises:
        DataError: a file cannot be read.
    """
    memo_path = cache_dir / "digests" / f"{digest_of([str(file.path.absolute()) for file in files])}.json"
    memo = _read_memo(memo_path)
    fresh: dict[str, list[int | str]] = {}
    known: list[tuple[str, str]] = []
    for file in files:
        try:
            status = file.path.stat()
            stamp: list[int | str] = [status.st_size, status.st_mtime_ns]
            path = str(file.path.absolute())
            entry = memo.get(path)
            if entry is None or entry[:2] != stamp:
                settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
                with file.path.open("rb") as stream:
                    entry = [*stamp, file_digest(stream, _new_hash).hexdigest()]
            else:
                settled = True
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read ({error.strerror})") from None
        if settled:
            fresh[path] = entry
        known.append((file.name, str(entry[2])))
    if fresh != memo:
        _write_memo(memo_path, fresh)
    return digest_of(known)


def digest_store(store: TokenStore) -> str:
    """Digest of a token store: the whole index, and evenly spaced samples of the tokens (a store may be terabytes)."""
    digest = _new_hash()
    try:
        with store.idx_path.open("rb") as index:
            digest.update(file_digest(index, _new_hash).digest())
        with store.bin_path.open("rb") as tokens:
            size = os.fstat(tokens.fileno()).st_size
            for sample in range(_NUM_SAMPLES):
                tokens.seek(max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(tokens.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"{store.prefix}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _new_hash() -> blake2b:
    return blake2b(digest_size=DIGEST_BYTES)


def _read_memo(path: Path) -> dict[str, list[int | str]]:
    """The remembered digests; anything unreadable counts as nothing remembered."""
    try:
        memo = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(memo, dict):
        return {}
    return {key: entry for key, entry in memo.items() if isinstance(entry, list) and len(entry) == 3}


def _write_memo(path: Path, memo: dict[str, list[int | str]]) -> None:
    """Replace the memo; a failure is left to the store's own writing to report."""
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(memo), encoding="utf-8")
        staged.replace(path)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
