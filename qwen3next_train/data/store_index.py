"""The index of a token store, ``PREFIX.idx``; its format is described in :mod:`~qwen3next_train.data.token_store`."""

from __future__ import annotations

import struct

import numpy as np

from qwen3next_train.data.checked_file import CheckedFile, NumberArray
from qwen3next_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Megatron-LM's dtype codes of integer tokens (6 and 7 are floats)."""

_CHUNK = 1 << 20


class StoreIndex:
    """Where sequences and documents begin. Opening checks all of it.

    Args:
        file: the index.
        bin_name: name of the tokens' file, for messages.
        bin_bytes: its size.

    Raises:
        DataError: the index is damaged, or does not belong to these tokens.
        StorageError: it cannot be read now.
    """

    def __init__(self, file: CheckedFile, bin_name: str, bin_bytes: int) -> None:
        self._file = file
        self.dtype, num_sequences, num_starts = _read_header(file)
        if bin_bytes % self.dtype.itemsize:
            raise DataError(
                f"{bin_name}: size {bin_bytes} is not a multiple of {self.dtype.itemsize} ({self.dtype} tokens); "
                "the file is cut or of another dtype"
            )
        offset = HEADER.size
        self.lengths = NumberArray(file, "<i4", offset, num_sequences)
        self.pointers = NumberArray(file, "<i8", offset + 4 * num_sequences, num_sequences)
        self.documents = NumberArray(file, "<i8", offset + 12 * num_sequences, num_starts)
        self._check_sequences(bin_name, bin_bytes)
        self._check_documents()

    def _check_sequences(self, bin_name: str, bin_bytes: int) -> None:
        """Lengths are not negative and pointers are their running sum, up to the size of ``.bin``."""
        path, expected = self._file.path, 0
        for first in range(0, len(self.lengths), _CHUNK):
            last = min(first + _CHUNK, len(self.lengths))
            lengths = self.lengths.slice(first, last)
            if (lengths < 0).any():
                index = first + int(np.argmax(lengths < 0))
                raise DataError(f"{path}: length of sequence {index}: expected >= 0, found {lengths.min()}")
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            expected_pointers, pointers = np.concatenate([[expected], ends[:-1]]), self.pointers.slice(first, last)
            wrong = expected_pointers != pointers
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{path}: pointer of sequence {first + at}: expected {expected_pointers[at]}, "
                    f"found {pointers[at]}; the index is damaged"
                )
            expected = int(ends[-1])
        if expected != bin_bytes:
            raise DataError(
                f"{bin_name}: expected {expected} bytes as in {path.name}, found {bin_bytes}; "
                "the file is cut or belongs to another index"
            )

    def _check_documents(self) -> None:
        """Document indices ascend from 0 to the number of sequences."""
        path, previous = self._file.path, 0
        for first in range(0, len(self.documents), _CHUNK):
            last = min(first + _CHUNK, len(self.documents))
            indices = np.concatenate([[previous], self.documents.slice(first, last)])
            if (np.diff(indices) < 0).any() or (first == 0 and indices[1] != 0):
                at = first + int(np.argmax(np.diff(indices) < 0))
                raise DataError(f"{path}: document index {at}: expected 0, then ascending; found otherwise")
            previous = int(indices[-1])
        if previous != len(self.lengths):
            raise DataError(f"{path}: last document index: expected {len(self.lengths)}, found {previous}")


def _read_header(file: CheckedFile) -> tuple[np.dtype[np.generic], int, int]:
    """Check the header against the file's size; return dtype, number of sequences, length of document indices."""
    path, size = file.path, file.num_bytes
    if size < HEADER.size:
        raise DataError(f"{path}: expected a header of {HEADER.size} bytes, found {size} bytes")
    magic, version, code, num_sequences, num_starts = HEADER.unpack(file.read(0, HEADER.size))
    if magic != MAGIC:
        raise DataError(f"{path}: expected magic {MAGIC!r}, found {magic!r}; not a Megatron-LM index")
    if version != VERSION:
        raise DataError(f"{path}: expected version {VERSION}, found {version}")
    if code not in TOKEN_DTYPES:
        raise DataError(f"{path}: expected the code of an integer dtype {sorted(TOKEN_DTYPES)}, found {code}")
    expected = HEADER.size + num_sequences * (4 + 8) + num_starts * 8
    if size != expected:
        raise DataError(
            f"{path}: expected {expected} bytes for {num_sequences} sequences and {num_starts} document indices, "
            f"found {size}"
        )
    if num_sequences < 1 or num_starts < 2:
        raise DataError(f"{path}: expected at least one document, found none; the store is empty")
    return TOKEN_DTYPES[code], num_sequences, num_starts
