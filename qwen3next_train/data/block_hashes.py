"""Hashes of a store's files, block by block: ``PREFIX.hashes``, written with the store.

All little endian, without padding:

====================  ==========================  ====================================================
field                 type                        meaning
====================  ==========================  ====================================================
magic                 8 bytes ``Q3NHASH1``
block size            uint64                      :data:`BLOCK_BYTES`
size of ``.bin``      uint64                      in bytes
size of ``.idx``      uint64                      in bytes
hash of the meta file 16 bytes                    xxh3-128 of ``.meta.json``
hashes of ``.bin``    uint64 [its blocks]         xxh3-64 of each block, the last one shorter
hashes of ``.idx``    uint64 [its blocks]         the same
hash of this file     16 bytes                    xxh3-128 of everything before
====================  ==========================  ====================================================

One hash costs 8 bytes per block, 128 MB for a store of a terabyte. They protect against accident, not against
somebody who recomputes them.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from qwen3next_train.data.reading import open_regular, read_at
from qwen3next_train.errors import DataError

BLOCK_BYTES = 1 << 16
"""What is read and hashed to read one row. Smaller blocks cost more per byte, larger ones more bytes per row."""

_MAGIC = b"Q3NHASH1"
_HEADER = struct.Struct("<8sQQQ16s")
_SELF_BYTES = 16


class BlockHasher:
    """Hashes a file while it is written."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._blocks: array[int] = array("Q")
        self._block = xxhash.xxh3_64()
        self._whole = xxhash.xxh3_128()

    def update(self, data: bytes) -> None:
        """Take the next bytes of the file."""
        self._whole.update(data)
        view = memoryview(data)
        while view:
            piece = view[: BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            self._block.update(piece)
            self.num_bytes += len(piece)
            view = view[len(piece) :]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.intdigest())
                self._block.reset()

    def whole(self) -> str:
        """xxh3-128 of everything so far, 32 hexadecimal digits."""
        return self._whole.hexdigest()

    def blocks(self) -> npt.NDArray[np.uint64]:
        """Hashes of all blocks, the last of which may be shorter: uint64 ``[blocks]``."""
        last = [self._block.intdigest()] if self.num_bytes % BLOCK_BYTES else []
        return np.array([*self._blocks, *last], dtype="<u8")


@dataclass(frozen=True)
class FileHashes:
    """Size and block hashes of one file.

    Args:
        num_bytes: of the file.
        blocks: uint64 ``[blocks]``.
    """

    num_bytes: int
    blocks: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class StoreHashes:
    """Content of ``PREFIX.hashes``.

    Args:
        bin: of the tokens.
        idx: of the index.
        meta: xxh3-128 of ``.meta.json``.
    """

    bin: FileHashes
    idx: FileHashes
    meta: bytes

    def encode(self) -> bytes:
        """The file's content."""
        header = _HEADER.pack(_MAGIC, BLOCK_BYTES, self.bin.num_bytes, self.idx.num_bytes, self.meta)
        content = header + self.bin.blocks.tobytes() + self.idx.blocks.tobytes()
        return content + xxhash.xxh3_128_digest(content)

    @classmethod
    def read(cls, path: Path) -> StoreHashes:
        """Read and check ``PREFIX.hashes``.

        Raises:
            DataError: it is missing or damaged.
            StorageError: it cannot be read now.
        """
        descriptor = open_regular(path)
        try:
            header = read_at(descriptor, path, 0, _HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise DataError(f"{path}: byte 0: expected a header of {_HEADER.size} bytes, found {header[:8]!r}")
            _, block_bytes, bin_bytes, idx_bytes, meta = _HEADER.unpack(header)
            num_blocks = [-(-num_bytes // BLOCK_BYTES) for num_bytes in (bin_bytes, idx_bytes)]
            expected, found = _HEADER.size + 8 * sum(num_blocks) + _SELF_BYTES, os.fstat(descriptor).st_size
            if block_bytes != BLOCK_BYTES or found != expected:
                raise DataError(
                    f"{path}: expected {expected} bytes for blocks of {BLOCK_BYTES}, found {found} bytes for blocks of "
                    f"{block_bytes}; the file is damaged"
                )
            body = read_at(descriptor, path, _HEADER.size, expected - _HEADER.size)
        finally:
            os.close(descriptor)
        content = header + body[:-_SELF_BYTES]
        if xxhash.xxh3_128_digest(content) != body[-_SELF_BYTES:]:
            raise DataError(f"{path}: does not match its own hash; the file is damaged")
        hashes = np.frombuffer(body[:-_SELF_BYTES], "<u8")
        first, second = hashes[: num_blocks[0]], hashes[num_blocks[0] :]
        return cls(FileHashes(bin_bytes, first), FileHashes(idx_bytes, second), meta)


def hash_of(content: bytes) -> bytes:
    """xxh3-128 of a small file's content: 16 bytes."""
    return xxhash.xxh3_128_digest(content)
