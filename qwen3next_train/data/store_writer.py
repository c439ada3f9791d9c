"""Writes token stores (format: :mod:`~qwen3next_train.data.token_store`) in bounded memory and publishes them whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.token_store import HEADER, MAGIC, TOKEN_DTYPES, VERSION, StoreMeta, store_paths
from qwen3next_train.errors import DataError, StorageError

_CHUNK = 1 << 20
_BUFFER_BYTES = 1 << 20


class StoreWriter:
    """Appends documents to a new store; a context manager that closes the files.

    Lengths go to a file next to the store while tokens stream, so memory does not grow with the corpus. Nothing
    can be read before :meth:`finish` has written ``.idx``.

    Args:
        prefix: path of the store without suffix, in a directory nobody reads yet.
        dtype: dtype of the tokens on disk.

    Raises:
        OSError: writing fails; the caller turns it into one line (:func:`storage_errors`).
    """

    def __init__(self, prefix: Path, dtype: np.dtype[np.generic]) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self._dtype = dtype
        self._bin_path, self._idx_path, self._meta_path = store_paths(prefix)
        self._lengths_path = prefix.with_name(prefix.name + ".lengths")
        self._bin: BinaryIO = self._bin_path.open("wb", buffering=_BUFFER_BYTES)
        self._lengths: BinaryIO = self._lengths_path.open("wb", buffering=_BUFFER_BYTES)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files; what is not finished stays without index."""
        for file in (self._bin, self._lengths):
            try:
                file.close()
            except OSError:
                if error is None:
                    raise

    def append(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Append one document: int64 ``[n]``, each id within the store's dtype.

        Raises:
            DataError: the document is longer than the format allows (2^31 - 1 tokens).
        """
        if len(token_ids) >= 1 << 31:
            raise DataError(
                f"{self._bin_path.name}: document of {len(token_ids)} tokens; the format ends at 2147483647"
            )
        self._bin.write(token_ids.astype(self._dtype).tobytes())
        self._lengths.write(len(token_ids).to_bytes(4, "little"))
        self.num_documents += 1
        self.num_tokens += len(token_ids)

    def finish(self, *, source: str, tokenizer_fingerprint: str, num_bytes: int | None) -> StoreMeta:
        """Write ``.meta.json`` and, last, ``.idx``; everything is on the disk when this returns."""
        for file in (self._bin, self._lengths):
            file.flush()
        os.fsync(self._bin.fileno())
        meta = StoreMeta(source, tokenizer_fingerprint, self.num_documents, self.num_tokens, num_bytes)
        meta.write(self._meta_path)
        with self._idx_path.open("wb") as index:
            self._write_index(index)
            index.flush()
            os.fsync(index.fileno())
        self._lengths_path.unlink()
        return meta

    def _write_index(self, index: BinaryIO) -> None:
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self._dtype)
        index.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))
        with self._lengths_path.open("rb") as lengths:
            shutil.copyfileobj(lengths, index, _BUFFER_BYTES)
            lengths.seek(0)
            end = 0
            while raw := lengths.read(4 * _CHUNK):
                sizes = np.frombuffer(raw, "<i4").astype(np.int64) * self._dtype.itemsize
                ends = end + np.cumsum(sizes)
                index.write((ends - sizes).astype("<i8").tobytes())
                end = int(ends[-1])
        for first in range(0, self.num_documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, self.num_documents + 1), dtype="<i8").tobytes())


@contextmanager
def storage_errors(where: Path, hint: str) -> Iterator[None]:
    """Turn an :class:`OSError` of the block (permission, disk full) into a one-line :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else where
        raise StorageError(f"{path}: cannot write ({error.strerror or error}); {hint}") from None


@contextmanager
def staging_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory under ``parent``, removed with all it holds when the block ends, unless it was renamed away."""
    staged = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Force a directory's entries (after a rename) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
