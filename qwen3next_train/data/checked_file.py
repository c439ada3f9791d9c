"""Reads a file of a store, each block compared with its hash before a byte of it is used."""

from __future__ import annotations

import os
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from qwen3next_train.data.block_hashes import BLOCK_BYTES, FileHashes
from qwen3next_train.data.reading import open_regular, read_at
from qwen3next_train.errors import DataError

_KEPT_BLOCKS = 16
_CHUNK_ITEMS = 1 << 13
_KEPT_CHUNKS = 64


class CheckedFile:
    """Random access to one file, by ``pread``, from any thread.

    On a file that shrinks or a disk that goes away a memory map dies of SIGBUS; a short read is an error that can be
    named. Without hashes (another program's store) only the size is known.

    Args:
        path: the file.
        hashes: of its blocks; None when there are none.

    Raises:
        DataError: there is no such file, or its size is another one.
        StorageError: it cannot be read now.
    """

    def __init__(self, path: Path, hashes: FileHashes | None) -> None:
        self.path = path
        self._hashes = hashes
        self._descriptor = descriptor = open_regular(path)
        weakref.finalize(self, os.close, descriptor)
        self.num_bytes = os.fstat(descriptor).st_size
        if hashes is not None and hashes.num_bytes != self.num_bytes:
            raise DataError(
                f"{path}: expected {hashes.num_bytes} bytes, found {self.num_bytes}; the file is cut, of another "
                "store, or written by another program"
            )
        # Of the descriptor and the hashes, not of self: a cycle would keep the file open.
        self._block = lru_cache(_KEPT_BLOCKS)(lambda index: _read_block(descriptor, path, hashes, index))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes ``[offset, offset + size)``.

        Raises:
            DataError: the file ends earlier, or a block does not match its hash. Names file and offset.
            StorageError: it cannot be read.
        """
        if self._hashes is None:
            data = read_at(self._descriptor, self.path, offset, size)
        else:
            first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
            blocks = [self._block(index) for index in range(first, last + 1)]
            start = offset - first * BLOCK_BYTES
            data = (blocks[0] if len(blocks) == 1 else b"".join(blocks))[start : start + size]
        if len(data) != size:
            raise DataError(f"{self.path}: expected {size} bytes at {offset}, found {len(data)}; the file was cut")
        return data

    def check(self) -> None:
        """Compare the whole file with its hashes; nothing to do without hashes.

        Raises:
            DataError: as :meth:`read`.
            StorageError: it cannot be read.
        """
        if self._hashes is not None:
            for index in range(len(self._hashes.blocks)):
                _read_block(self._descriptor, self.path, self._hashes, index)


class NumberArray:
    """Little-endian integers in a file, as one array: read in pieces, some of them kept.

    Args:
        file: the file.
        dtype: of the numbers.
        offset: of the first, in bytes.
        length: how many.
    """

    def __init__(self, file: CheckedFile, dtype: str, offset: int, length: int) -> None:
        self._length = length
        itemsize = np.dtype(dtype).itemsize

        def read(first: int, last: int) -> npt.NDArray[np.int64]:
            raw = file.read(offset + first * itemsize, (last - first) * itemsize)
            return np.frombuffer(raw, dtype).astype(np.int64)

        self.read = read
        self._chunk = lru_cache(_KEPT_CHUNKS)(
            lambda index: read(index * _CHUNK_ITEMS, min(length, (index + 1) * _CHUNK_ITEMS))
        )

    def __len__(self) -> int:
        """How many numbers there are."""
        return self._length

    def __getitem__(self, index: int) -> int:
        """The ``index``-th number, counted from 0."""
        return int(self._chunk(index // _CHUNK_ITEMS)[index % _CHUNK_ITEMS])

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Numbers ``[start, stop)``: int64."""
        return self.read(start, stop) if stop > start else np.empty(0, dtype=np.int64)


def _read_block(descriptor: int, path: Path, hashes: FileHashes | None, index: int) -> bytes:
    assert hashes is not None
    offset = index * BLOCK_BYTES
    expected_bytes = min(BLOCK_BYTES, hashes.num_bytes - offset)
    data = read_at(descriptor, path, offset, expected_bytes)
    if len(data) != expected_bytes:
        raise DataError(f"{path}: expected {expected_bytes} bytes at {offset}, found {len(data)}; the file was cut")
    found, expected = xxhash.xxh3_64_intdigest(data), int(hashes.blocks[index])
    if found != expected:
        raise DataError(
            f"{path}: bytes {offset} to {offset + expected_bytes - 1}: expected xxh3 {expected:016x}, found "
            f"{found:016x}; the tokens are not those that were written"
        )
    return data
