"""Digests of the content of source files, remembered while size and modification time stay the same."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b, file_digest
from pathlib import Path

from qwen3next_train.data.folders import SourceFile
from qwen3next_train.data.reading import read_error
from qwen3next_train.data.sealed_json import read_sealed, write_sealed
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import StorageError

DIGEST_BYTES = 16
_SETTLED_NS = 2_000_000_000
"""A younger file may change again within one tick of its file system's clock, so its digest is not remembered."""

_MAX_MEMO_BYTES = 64 << 20
"""Of a source of some 200,000 files; larger ones are read again each time."""

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
        DataError: a file is missing.
        StorageError: a file cannot be read now.
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
            raise read_error(file.path, error) from None
        if settled:
            fresh[path] = entry
        known.append((file.name, str(entry[2])))
    if fresh != memo:
        _write_memo(memo_path, fresh)
    return digest_of(known)


def digest_store(store: TokenStore) -> str:
    """Digest of a token store: the whole index, and evenly spaced samples of the tokens (a store may be terabytes).

    Raises:
        DataError: the store is damaged.
        StorageError: it cannot be read now.
    """
    digest, index = _new_hash(), _new_hash()
    for piece in store.index_pieces():
        index.update(piece)
    digest.update(index.digest())
    size = store.num_tokens * store.dtype.itemsize
    for sample in range(_NUM_SAMPLES):
        start = max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1)
        digest.update(store.read_bytes(start, min(size, start + _SAMPLE_BYTES)))
    return digest.hexdigest()


def _new_hash() -> blake2b:
    return blake2b(digest_size=DIGEST_BYTES)


def _read_memo(path: Path) -> dict[str, list[int | str]]:
    """The remembered digests; anything unreadable counts as nothing remembered."""
    try:
        memo = read_sealed(path, max_bytes=_MAX_MEMO_BYTES)
    except StorageError:
        return {}
    return memo if isinstance(memo, dict) else {}


def _write_memo(path: Path, memo: dict[str, list[int | str]]) -> None:
    """Replace the memo; a failure is left to the store's own writing to report."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, memo)
