"""Token stores in Megatron-LM's ``.bin/.idx`` format, ``MMIDIDX`` version 1.

The format is that of ``megatron/core/datasets/indexed_dataset.py``.
``PREFIX.bin`` holds all tokens in a row. ``PREFIX.idx``, little endian, without padding:

====================  ==============================================  ==========================================
field                 type                                            meaning
====================  ==============================================  ==========================================
magic                 9 bytes ``MMIDIDX\\0\\0``
version               uint64                                          1
dtype code            uint8                                           of the tokens, :data:`TOKEN_DTYPES`
sequence count        uint64                                          n
document count        uint64                                          documents + 1
sequence lengths      int32 [n]                                       in tokens
sequence pointers     int64 [n]                                       byte offset in ``.bin``
document indices      int64 [documents + 1]                           first sequence of each document, and n
====================  ==============================================  ==========================================

Our own stores have one sequence per document and a third file, ``PREFIX.meta.json`` (:class:`StoreMeta`).
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class StoreMeta:
    """What a store's two binary files do not tell.

    Args:
        source: what was tokenised, as the user named it.
        tokenizer_fingerprint: :attr:`Tokenizer.fingerprint` of the tokenizer.
        num_documents: documents in the store.
        num_tokens: tokens in the store, end-of-document tokens included.
        num_bytes: UTF-8 bytes of the documents; None when some came as token ids.
    """

    source: str
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int | None

    def write(self, path: Path) -> None:
        """Write as JSON and force it to the disk.

        Raises:
            OSError: when that fails.
        """
        with path.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path: Path) -> StoreMeta:
        """Read back what :meth:`write` wrote.

        Raises:
            DataError: when the file is not such a file.
        """
        try:
            meta = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); remove it or tokenize again") from None
        counts = (meta.num_documents, meta.num_tokens, 0 if meta.num_bytes is None else meta.num_bytes)
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise DataError(f"{path}: expected counts >= 0, found {counts}; remove it or tokenize again")
        return meta


def store_paths(prefix: Path) -> tuple[Path, Path, Path]:
    """Return the paths of ``.bin``, ``.idx`` and ``.meta.json`` of the store at ``prefix``."""
    return (
        prefix.with_name(prefix.name + ".bin"),
        prefix.with_name(prefix.name + ".idx"),
        prefix.with_name(prefix.name + ".meta.json"),
    )


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Smallest dtype Megatron-LM uses for a vocabulary."""
    return TOKEN_DTYPES[8 if vocab_size < 65500 else 4]


class TokenStore:
    """Read access to one store. Opening checks everything that reading relies on except the token ids.

    Tokens are read with ``pread``: on a file that shrinks or a disk that goes away a memory map dies of SIGBUS,
    whereas a short read is an error that can be named. The index is mapped, so ranks of one host share it.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        DataError: a file is missing, damaged, or the two do not belong together. Names file, expected, found.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.bin_path, self.idx_path, self.meta_path = store_paths(prefix)
        self.dtype, num_sequences, num_starts = _read_header(self.idx_path)
        try:
            self._bin = self.bin_path.open("rb", buffering=0)
            bin_bytes = os.fstat(self._bin.fileno()).st_size
            offset = HEADER.size
            self._lengths = np.memmap(self.idx_path, "<i4", "r", offset, num_sequences)
            offset += self._lengths.nbytes
            self._pointers = np.memmap(self.idx_path, "<i8", "r", offset, num_sequences)
            offset += self._pointers.nbytes
            self._documents = np.memmap(self.idx_path, "<i8", "r", offset, num_starts)
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}: cannot open the token store ({error})") from None
        if bin_bytes % self.dtype.itemsize:
            raise DataError(
                f"{self.bin_path}: size {bin_bytes} is not a multiple of {self.dtype.itemsize} ({self.dtype} tokens); "
                "the file is cut or of another dtype"
            )
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self.num_documents = num_starts - 1
        self._check_sequences(bin_bytes)
        self._check_documents(num_sequences)

    def document_start(self, document: int) -> int:
        """Position in the store of a document's first token; :attr:`num_tokens` for ``num_documents``."""
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``[start, stop)`` of the store: int64 ``[stop - start]``.

        Raises:
            DataError: the file ends early or cannot be read.
        """
        size, offset = (stop - start) * self.dtype.itemsize, start * self.dtype.itemsize
        try:
            raw = os.pread(self._bin.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{self.bin_path}: cannot read at byte {offset} ({error})") from None
        if len(raw) != size:
            raise DataError(f"{self.bin_path}: expected {size} bytes at {offset}, found {len(raw)}; the file was cut")
        return np.frombuffer(raw, self.dtype).astype(np.int64)

    def document_starts_between(self, start: int, stop: int, documents: range) -> npt.NDArray[np.int64]:
        """Starts of those of ``documents`` that begin in ``[start, stop)``: int64, ascending, each once."""
        first = bisect_left(documents, start, key=self.document_start)
        last = bisect_left(documents, stop, lo=first, key=self.document_start)
        sequences = np.array(self._documents[documents.start + first : documents.start + last])
        pointers = np.asarray(self._pointers[sequences[sequences < len(self._pointers)]])
        return np.unique(pointers // self.dtype.itemsize)

    def meta(self) -> StoreMeta | None:
        """The sidecar's content, or None for a store without one (written by another program).

        Raises:
            DataError: it is unreadable or does not belong to this store.
        """
        if not self.meta_path.exists():
            return None
        meta = StoreMeta.read(self.meta_path)
        found = (self.num_documents, self.num_tokens)
        if (meta.num_documents, meta.num_tokens) != found:
            raise DataError(
                f"{self.meta_path}: expected {meta.num_documents} documents and {meta.num_tokens} tokens, the store "
                f"has {found[0]} and {found[1]}; remove the sidecar or tokenize again"
            )
        return meta

    def _check_sequences(self, bin_bytes: int) -> None:
        """Lengths are not negative and pointers are their running sum, up to the size of ``.bin``."""
        expected = 0
        for first in range(0, len(self._lengths), _CHUNK):
            lengths = self._lengths[first : first + _CHUNK].astype(np.int64)
            if (lengths < 0).any():
                index = first + int(np.argmax(lengths < 0))
                raise DataError(f"{self.idx_path}: length of sequence {index}: expected >= 0, found {lengths.min()}")
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            pointers = np.concatenate([[expected], ends[:-1]])
            wrong = pointers != self._pointers[first : first + _CHUNK]
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self.idx_path}: pointer of sequence {first + at}: expected {pointers[at]}, "
                    f"found {self._pointers[first + at]}; the index is damaged"
                )
            expected = int(ends[-1])
        if expected != bin_bytes:
            raise DataError(
                f"{self.bin_path}: expected {expected} bytes as in {self.idx_path.name}, found {bin_bytes}; "
                "the file is cut or belongs to another index"
            )

    def _check_documents(self, num_sequences: int) -> None:
        """Document indices ascend from 0 to the number of sequences."""
        previous = 0
        for first in range(0, len(self._documents), _CHUNK):
            indices = np.concatenate([[previous], self._documents[first : first + _CHUNK]])
            if (np.diff(indices) < 0).any() or (first == 0 and indices[1] != 0):
                at = first + int(np.argmax(np.diff(indices) < 0))
                raise DataError(f"{self.idx_path}: document index {at}: expected 0, then ascending; found otherwise")
            previous = int(indices[-1])
        if previous != num_sequences:
            raise DataError(f"{self.idx_path}: last document index: expected {num_sequences}, found {previous}")


class DocumentRange:
    """Consecutive documents of a store as one stream of tokens, positions counted from the first of them.

    Args:
        store: the store.
        documents: which documents, at least one.
    """

    def __init__(self, store: TokenStore, documents: range) -> None:
        self.store = store
        self.documents = documents
        self._first_token = store.document_start(documents.start)
        self.num_tokens = store.document_start(documents.stop) - self._first_token

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``[start, stop)`` of the stream: int64 ``[stop - start]``."""
        return self.store.read(self._first_token + start, self._first_token + stop)

    def position_in_store(self, position: int) -> int:
        """The store's count of a position of the stream."""
        return self._first_token + position

    def document_starts_between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Document starts in ``[start, stop)``: int64, ascending, each once; costs O(log documents)."""
        first = self._first_token
        return self.store.document_starts_between(first + start, first + stop, self.documents) - first


def _read_header(path: Path) -> tuple[np.dtype[np.generic], int, int]:
    """Check ``.idx``'s header against its size; return dtype, number of sequences, length of document indices."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: expected a header of {HEADER.size} bytes, found {len(raw)} bytes")
    magic, version, code, num_sequences, num_starts = HEADER.unpack(raw)
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
