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

Our own stores have one sequence per document and two files more, ``PREFIX.meta.json``
(:mod:`~qwen3next_train.data.store_meta`) and ``PREFIX.hashes`` (:mod:`~qwen3next_train.data.block_hashes`). With the
hashes every block of tokens and index is checked before a token of it is used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.block_hashes import StoreHashes, hash_of
from qwen3next_train.data.checked_file import CheckedFile
from qwen3next_train.data.reading import is_missing, read_small_file
from qwen3next_train.data.store_index import TOKEN_DTYPES, StoreIndex
from qwen3next_train.data.store_meta import MAX_META_BYTES, StoreMeta
from qwen3next_train.errors import DataError
from qwen3next_train.log import get_logger

_PIECE_BYTES = 1 << 20


class StorePaths(NamedTuple):
    """A store's files."""

    bin: Path
    idx: Path
    meta: Path
    hashes: Path


def store_paths(prefix: Path) -> StorePaths:
    """Return the paths of the files of the store at ``prefix``."""
    return StorePaths(*(prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".meta.json", ".hashes")))


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Smallest dtype Megatron-LM uses for a vocabulary."""
    return TOKEN_DTYPES[8 if vocab_size < 65500 else 4]


class TokenStore:
    """Read access to one store, from any thread.

    Opening checks everything that reading relies on except the tokens; those are checked as they are read, or all at
    once by :meth:`check`. A store without hashes, another program's, is checked as far as its format allows.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        damage_note: an empty file of this name is made when damage is met later, for whoever can build the store
            again; None for nobody.

    Raises:
        DataError: a file is missing, damaged, or they do not belong together. Names file, expected, found.
        StorageError: a file cannot be read now.
    """

    def __init__(self, prefix: Path, *, damage_note: Path | None = None) -> None:
        self.prefix = prefix
        self._damage_note = damage_note
        paths = store_paths(prefix)
        self.bin_path = paths.bin
        for path in (paths.bin, paths.idx):
            if is_missing(path):
                raise DataError(
                    f"{path}: missing; a token store is {prefix.name}.bin with {prefix.name}.idx beside it, so put "
                    "both there, or tokenise the text again"
                )
        try:
            self._open(paths)
        except DataError as error:
            raise self._damaged_at_start(error) from None
        if not self.has_hashes:
            _say_unhashed(prefix)

    def _open(self, paths: StorePaths) -> None:
        self._meta, hashes = _read_side_files(paths)
        self.has_hashes = hashes is not None
        self._bin = CheckedFile(paths.bin, None if hashes is None else hashes.bin)
        self._idx = CheckedFile(paths.idx, None if hashes is None else hashes.idx)
        self._index = StoreIndex(self._idx, str(paths.bin), self._bin.num_bytes)
        self.dtype = self._index.dtype
        self.num_tokens = self._bin.num_bytes // self.dtype.itemsize
        self.num_documents = len(self._index.documents) - 1
        found = (self.num_documents, self.num_tokens)
        if self._meta is not None and (self._meta.num_documents, self._meta.num_tokens) != found:
            raise DataError(
                f"{paths.meta}: expected {self._meta.num_documents} documents and {self._meta.num_tokens} tokens, "
                f"the store has {found[0]} and {found[1]}"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of tokens and index."""
        return self._bin.num_bytes + self._idx.num_bytes

    def meta(self) -> StoreMeta | None:
        """What ``.meta.json`` says, or None for a store without one (written by another program)."""
        return self._meta

    def check(self) -> None:
        """Read all of the store and compare it with its hashes; a store without hashes is not read.

        Raises:
            DataError: a block is damaged. Names file and offset.
            StorageError: it cannot be read now.
        """
        try:
            self._idx.check()
            self._bin.check()
        except DataError as error:
            raise self._damaged_at_start(error) from None

    def index_pieces(self) -> Iterator[bytes]:
        """The content of ``.idx``. Raises as :meth:`read`."""
        for start in range(0, self._idx.num_bytes, _PIECE_BYTES):
            yield self._idx.read(start, min(_PIECE_BYTES, self._idx.num_bytes - start))

    def document_start(self, document: int) -> int:
        """Position in the store of a document's first token; :attr:`num_tokens` for ``num_documents``.

        Raises:
            DataError: the index is damaged there.
            StorageError: it cannot be read now.
        """
        try:
            sequence = self._index.documents[document]
            if sequence == len(self._index.pointers):
                return self.num_tokens
            return self._index.pointers[sequence] // self.dtype.itemsize
        except DataError as error:
            raise self._damaged(error) from None

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``[start, stop)`` of the store: int64 ``[stop - start]``.

        Raises:
            DataError: the store is damaged there. Names file and offset.
            StorageError: it cannot be read now.
        """
        return np.frombuffer(
            self.read_bytes(start * self.dtype.itemsize, stop * self.dtype.itemsize), self.dtype
        ).astype(np.int64)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of ``.bin``. Raises as :meth:`read`."""
        try:
            return self._bin.read(start, stop - start) if stop > start else b""
        except DataError as error:
            raise self._damaged(error) from None

    def document_starts_between(self, start: int, stop: int, documents: range) -> npt.NDArray[np.int64]:
        """Starts of those of ``documents`` that begin in ``[start, stop)``: int64, ascending, each once.

        Raises:
            DataError: the index is damaged there.
            StorageError: it cannot be read now.
        """
        first = bisect_left(documents, start, key=self.document_start)
        last = bisect_left(documents, stop, lo=first, key=self.document_start)
        try:
            sequences = self._index.documents.slice(documents.start + first, documents.start + last)
            sequences = sequences[sequences < len(self._index.pointers)]
            if not len(sequences):
                return np.empty(0, dtype=np.int64)
            pointers = self._index.pointers.slice(int(sequences[0]), int(sequences[-1]) + 1)
        except DataError as error:
            raise self._damaged(error) from None
        return np.unique(pointers[sequences - sequences[0]] // self.dtype.itemsize)

    def _damaged_at_start(self, error: DataError) -> DataError:
        """Who can build the store again does it now, and needs neither a note nor advice."""
        return self._damaged(error) if self._damage_note is None else error

    def _damaged(self, error: DataError) -> DataError:
        if self._damage_note is None:
            return DataError(f"{error}; restore the store or tokenize again")
        with suppress(OSError):
            self._damage_note.touch()
        return DataError(f"{error}; run the same command again, which tokenizes the source again")


def _read_side_files(paths: StorePaths) -> tuple[StoreMeta | None, StoreHashes | None]:
    """Both side files, checked against each other; None for those that a foreign or earlier store does not have."""
    has_hashes = not is_missing(paths.hashes)
    if is_missing(paths.meta):
        if has_hashes:
            raise DataError(
                f"{paths.meta}: missing, but {paths.hashes.name} is there, which has to go too when another program "
                "wrote the store"
            )
        return None, None
    raw = read_small_file(paths.meta, max_bytes=MAX_META_BYTES)
    hashes = StoreHashes.read(paths.hashes) if has_hashes else None
    if hashes is not None and hashes.meta != hash_of(raw):
        raise DataError(
            f"{paths.meta}: does not match its hash in {paths.hashes.name}; one of them is damaged or of another store"
        )
    meta = StoreMeta.decode(raw, paths.meta)
    if meta.has_hashes and hashes is None:
        raise DataError(f"{paths.hashes}: missing")
    return meta, hashes


@cache
def _say_unhashed(prefix: Path) -> None:
    get_logger().info(
        "%s: a store without hashes, as other programs write it; its index and sizes are checked, its tokens only "
        "against the vocabulary",
        prefix,
    )


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
