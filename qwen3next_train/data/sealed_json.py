"""Small JSON files that may be lost: written with a hash, and read as nothing when they are not intact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from qwen3next_train.data.reading import read_small_file, remove
from qwen3next_train.errors import DataError


def write_sealed(path: Path, value: object) -> None:
    """Replace ``path``. Not forced to the disk: a kill loses nothing, and after a power cut the hash tells.

    Raises:
        OSError: when that fails; what was written is removed then.
    """
    content = json.dumps(value)
    # One name for everybody, so that a killed process leaves at most one; two writers at once break the hash at worst.
    staged = path.with_name(path.name + ".tmp")
    try:
        remove(staged)
        with staged.open("x", encoding="utf-8") as file:  # opening a named pipe would wait for a reader for ever
            file.write(json.dumps({"hash": _hash(content), "content": content}))
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def read_sealed(path: Path, *, max_bytes: int) -> Any:
    """What :func:`write_sealed` wrote; None when there is no intact file.

    Raises:
        StorageError: it cannot be read now.
    """
    try:
        envelope = json.loads(read_small_file(path, max_bytes=max_bytes))
        content = envelope["content"]
        return json.loads(content) if envelope["hash"] == _hash(content) else None
    except (DataError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _hash(content: str) -> str:
    return xxhash.xxh3_128_hexdigest(content.encode())
