"""Writes token stores (format: :mod:`~qwen3next_train.data.token_store`) in bounded memory, resumable after a kill."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.block_hashes import BlockHasher, FileHashes, StoreHashes, hash_of
from qwen3next_train.data.reading import open_regular, remove
from qwen3next_train.data.store_index import HEADER, MAGIC, TOKEN_DTYPES, VERSION
from qwen3next_train.data.store_meta import StoreMeta
from qwen3next_train.data.token_store import store_paths
from qwen3next_train.errors import DataError, StorageError
from qwen3next_train.exhaustion import system_reason

_CHUNK = 1 << 20
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenSoFar:
    """What of a store is in its files: enough to go on there, and to notice that the files are not those.

    Args:
        num_documents: documents appended.
        num_tokens: tokens appended.
        bin_hash: xxh3-128 of ``.bin`` so far.
        lengths_hash: xxh3-128 of the documents' lengths so far.
    """

    num_documents: int
    num_tokens: int
    bin_hash: str
    lengths_hash: str


class StoreWriter:
    """Appends documents to a store; a context manager that closes the files.

    Lengths go to a file next to the store while tokens stream, so memory does not grow with the corpus (but for 8
    bytes a block of :data:`~qwen3next_train.data.block_hashes.BLOCK_BYTES`). Nothing can be read before
    :meth:`finish` has written ``.idx``.

    Args:
        prefix: path of the store without suffix, in a directory nobody reads yet.
        dtype: dtype of the tokens on disk.
        resume: what an interrupted writer had written (:meth:`written`); None begins anew.

    Raises:
        DataError: the files do not hold what ``resume`` says.
        OSError: writing fails; the caller turns it into one line (:func:`storage_errors`).
    """

    def __init__(self, prefix: Path, dtype: np.dtype[np.generic], *, resume: WrittenSoFar | None = None) -> None:
        self.num_documents = 0 if resume is None else resume.num_documents
        self.num_tokens = 0 if resume is None else resume.num_tokens
        self._is_finished = False
        self._dtype = dtype
        self._paths = store_paths(prefix)
        self._lengths_path = lengths_path(prefix)
        self._bin_hasher, self._lengths_hasher = BlockHasher(), BlockHasher()
        bin_bytes = self.num_tokens * dtype.itemsize
        bin_hash, lengths_hash = (None, None) if resume is None else (resume.bin_hash, resume.lengths_hash)
        self._bin = _open_at(self._paths.bin, bin_bytes, bin_hash, self._bin_hasher)
        try:
            self._lengths = _open_at(self._lengths_path, 4 * self.num_documents, lengths_hash, self._lengths_hasher)
        except BaseException:
            self._bin.close()
            raise

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files; what is not finished stays without index, and can be gone on with."""
        for file in (self._bin, self._lengths):
            try:
                file.close()
            except OSError:
                if error is None:
                    raise
        if self._is_finished and error is None:
            self._lengths_path.unlink()

    def append(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Append one document: int64 ``[n]``, each id within the store's dtype.

        Raises:
            DataError: the document is longer than the format allows (2^31 - 1 tokens).
        """
        if len(token_ids) >= 1 << 31:
            raise DataError(
                f"{self._paths.bin.name}: document of {len(token_ids)} tokens; the format ends at 2147483647"
            )
        raw, length = token_ids.astype(self._dtype).tobytes(), len(token_ids).to_bytes(4, "little")
        self._bin.write(raw)
        self._bin_hasher.update(raw)
        self._lengths.write(length)
        self._lengths_hasher.update(length)
        self.num_documents += 1
        self.num_tokens += len(token_ids)

    def written(self) -> WrittenSoFar:
        """Hand everything to the operating system, which keeps it when this process is killed; say what it is."""
        for file in (self._bin, self._lengths):
            file.flush()
        return WrittenSoFar(self.num_documents, self.num_tokens, self._bin_hasher.whole(), self._lengths_hasher.whole())

    def finish(self, *, source: str, tokenizer_fingerprint: str, num_bytes: int | None, entry: str = "") -> StoreMeta:
        """Write ``.meta.json``, ``.hashes`` and, last, ``.idx``; everything is on the disk when this returns.

        The file of lengths goes when the block ends: up to then another writer could go on from here.
        """
        for file in (self._bin, self._lengths):
            file.flush()
        os.fsync(self._bin.fileno())
        meta = StoreMeta(
            source, tokenizer_fingerprint, self.num_documents, self.num_tokens, num_bytes, entry, has_hashes=True
        )
        raw = meta.encode()
        _write_durably(self._paths.meta, raw)
        idx_hasher = BlockHasher()
        unfinished = self._paths.idx.with_name(self._paths.idx.name + ".tmp")
        with _open_new(unfinished) as index:
            for piece in self._index_pieces():
                index.write(piece)
                idx_hasher.update(piece)
            index.flush()
            os.fsync(index.fileno())
        hashes = StoreHashes(_file_hashes(self._bin_hasher), _file_hashes(idx_hasher), hash_of(raw))
        _write_durably(self._paths.hashes, hashes.encode())
        unfinished.replace(self._paths.idx)
        self._is_finished = True
        return meta

    def _index_pieces(self) -> Iterator[bytes]:
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self._dtype)
        yield HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1)
        with self._lengths_path.open("rb") as lengths:
            while raw := lengths.read(4 * _CHUNK):
                yield raw
            lengths.seek(0)
            end = 0
            while raw := lengths.read(4 * _CHUNK):
                sizes = np.frombuffer(raw, "<i4").astype(np.int64) * self._dtype.itemsize
                ends = end + np.cumsum(sizes)
                yield (ends - sizes).astype("<i8").tobytes()
                end = int(ends[-1])
        for first in range(0, self.num_documents + 1, _CHUNK):
            yield np.arange(first, min(first + _CHUNK, self.num_documents + 1), dtype="<i8").tobytes()


def lengths_path(prefix: Path) -> Path:
    """Where a writer keeps the lengths of the documents of the store at ``prefix``."""
    return prefix.with_name(prefix.name + ".lengths")


def _open_at(path: Path, num_bytes: int, expected_hash: str | None, hasher: BlockHasher) -> BinaryIO:
    """Open for writing behind the first ``num_bytes``, which go through the hasher; what is behind them is cut off."""
    if expected_hash is None:
        return _open_new(path)
    os.close(open_regular(path))  # opening a named pipe would wait, or read from it for ever
    file = path.open("r+b", buffering=_BUFFER_BYTES)
    try:
        rest = num_bytes
        while rest and (piece := file.read(min(rest, _BUFFER_BYTES))):
            hasher.update(piece)
            rest -= len(piece)
        if rest or hasher.whole() != expected_hash:
            raise DataError(f"{path}: not what was written before the interruption")
        file.seek(num_bytes)
        file.truncate()
    except BaseException:
        file.close()
        raise
    return file


def _open_new(path: Path) -> BinaryIO:
    """Open a new file, in place of whatever has its name."""
    remove(path)
    return path.open("xb", buffering=_BUFFER_BYTES)


def _file_hashes(hasher: BlockHasher) -> FileHashes:
    return FileHashes(hasher.num_bytes, hasher.blocks())


def _write_durably(path: Path, content: bytes) -> None:
    with _open_new(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def storage_errors(where: Path, hint: str) -> Iterator[None]:
    """Turn an :class:`OSError` of the block (permission, disk full) into a one-line :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else where
        raise StorageError(f"{path}: cannot write ({system_reason(error)}); {hint}") from None


@contextmanager
def staging_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory under ``parent``, removed with all it holds when the block ends, unless it was renamed away."""
    staged = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield staged
    finally:
        rmtree(staged, ignore_errors=True)
