"""``PREFIX.meta.json``: what a store's two binary files do not tell."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.data.reading import read_small_file
from qwen3next_train.errors import DataError

MAX_META_BYTES = 1 << 16


@dataclass(frozen=True)
class StoreMeta:
    """Facts about a store.

    Args:
        source: what was tokenised, as the user named it.
        tokenizer_fingerprint: :attr:`Tokenizer.fingerprint` of the tokenizer.
        num_documents: documents in the store.
        num_tokens: tokens in the store, end-of-document tokens included.
        num_bytes: UTF-8 bytes of the documents; None when some came as token ids.
        entry: the cache's key and the part of the source, so that no entry passes for another; empty elsewhere.
        has_hashes: whether ``.hashes`` was written with it; False in stores of earlier versions.
    """

    source: str
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int | None
    entry: str = ""
    has_hashes: bool = False

    def encode(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def decode(cls, raw: bytes, path: Path) -> StoreMeta:
        """Read back what :meth:`encode` wrote.

        Raises:
            DataError: it is not such a file.
        """
        try:
            value = json.loads(raw)
            _check_types(value)
            return cls(**value)
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not a store's meta file ({json_problem(error)})") from None

    @classmethod
    def read(cls, path: Path) -> StoreMeta:
        """Read the file.

        Raises:
            DataError: it is missing or not such a file.
            StorageError: it cannot be read now.
        """
        return cls.decode(read_small_file(path, max_bytes=MAX_META_BYTES), path)


def entry_name(key: str, part: str, num_parts: int) -> str:
    """What :attr:`StoreMeta.entry` says in the stores of the cache's entry ``key``."""
    return f"{key}/{part} of {num_parts}"


def _check_types(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    known = {field.name: field.type for field in fields(StoreMeta)}
    for name, found in value.items():
        kind = known.get(name)
        if kind is None:
            raise ValueError(f"unknown field {name[:40]!r}")
        allowed = {"str": str, "bool": bool}.get(str(kind), int)
        if type(found) is not allowed and not (found is None and name == "num_bytes"):
            raise ValueError(f"{name}: expected {kind}, found {type(found).__name__}")
        if isinstance(found, int) and found < 0:
            raise ValueError(f"{name}: expected >= 0, found {found}")
