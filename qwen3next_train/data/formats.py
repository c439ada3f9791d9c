"""Which files are read and how: the one table of suffixes, and opening what is compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast


class Format(Enum):
    """How the documents of a file are found."""

    TEXT = "text"
    """One document a file, UTF-8."""
    JSON = "json"
    """An object a line, or one array of objects."""
    CSV = "csv"
    """A header, then a row a document."""
    TSV = "tsv"
    """The same with tabs."""
    PARQUET = "parquet"
    ARROW = "arrow"
    """Arrow's IPC format, of a file or of a stream."""


_PROSE = ".txt .text .md .markdown .rst .tex"
_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .cs .go .hs .java .jl .js .jsx .kt .lua .m .ml .php .pl .pm .r .rb .rs "
    ".scala .sh .sql .swift .ts .tsx"
)
FORMATS: dict[str, Format] = {
    **dict.fromkeys((*_PROSE.split(), *_CODE.split()), Format.TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), Format.JSON),
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
}
"""Format by suffix, in lower case. What is not here is not read."""

Compression = Literal["gzip", "zstd", "xz", "bz2"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
"""Compression by suffix after that of the format. Parquet and arrow files are compressed inside, never outside."""

READ = ".txt and other text, .jsonl, .json, .csv, .tsv (each also .gz, .zst, .xz, .bz2), .parquet, .arrow"
"""What is read, for messages."""

DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What decompression raises besides an :class:`OSError` without error number."""


_STORED_BYTES = 1 << 16


@dataclass(frozen=True)
class FileFormat:
    """How to read a file.

    Args:
        kind: how its documents are found.
        compression: what is undone first, None for nothing.
    """

    kind: Format
    compression: Compression | None

    @property
    def holds_records(self) -> bool:
        """Whether the file holds many documents, each in a field of its record."""
        return self.kind is not Format.TEXT


def format_of(name: str) -> FileFormat | None:
    """The format that a file's name says, in upper or lower case; None for a file that is not read."""
    path = Path(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression is not None:
        path = path.with_suffix("")
    kind = FORMATS.get(path.suffix)
    if kind is None or (compression is not None and kind in (Format.PARQUET, Format.ARROW)):
        return None
    return FileFormat(kind, compression)


def suffix_of(name: str) -> str:
    """The suffix that decided, for messages: ``.pdf``, ``.parquet.gz``; empty when there is none."""
    suffixes = Path(name.lower()).suffixes
    return "".join(suffixes[-2:] if suffixes and suffixes[-1] in COMPRESSIONS else suffixes[-1:])


class ByteStream:
    """The bytes of a file, decompressed, and how much of the stored file has been read for them; a context manager.

    Args:
        path: the file.
        compression: how it is compressed.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, compression: Compression | None) -> None:
        self._raw = path.open("rb")
        self._stream = _decompressed(self._raw, compression)

    def __enter__(self) -> ByteStream:
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes of the stored file read so far, up to a buffer more than has been used."""
        return self._raw.tell()

    def peek(self) -> bytes:
        """The next bytes without consuming them, as many as are at hand; empty at the end."""
        return self._stream.peek(1)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, fewer only at the end."""
        return self._stream.read(size)

    def readline(self, size: int) -> bytes:
        """A line with its end, or the first ``size`` bytes of it; empty at the end."""
        return self._stream.readline(size)


def _decompressed(raw: io.BufferedReader, compression: Compression | None) -> io.BufferedReader:
    if compression is None:
        return raw
    if compression == "gzip":
        return cast(io.BufferedReader, gzip.GzipFile(fileobj=raw))
    if compression == "bz2":
        return io.BufferedReader(_Members(raw, bz2.BZ2Decompressor))
    if compression == "xz":
        return io.BufferedReader(_Members(raw, lzma.LZMADecompressor))
    import pyarrow  # type: ignore[import-untyped]

    native = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)
    return io.BufferedReader(native)


class _Members(io.RawIOBase):
    """What the members of an xz or bz2 file hold, one after the other; zeros may stand between and behind them.

    Python's own ``LZMAFile`` and ``BZ2File`` take anything else behind a member for the file's end, a damaged member
    and xz's padding included.
    """

    def __init__(self, raw: io.BufferedReader, new: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]) -> None:
        self._raw, self._new = raw, new
        self._member = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of ``buffer``; 0 at the end. Raises what :data:`DAMAGED` names, or an error of the system."""
        while True:
            block = b""
            if self._member.eof:
                block = self._member.unused_data.lstrip(b"\0")
                while not block:
                    stored = self._raw.read(_STORED_BYTES)
                    if not stored:
                        return 0
                    block = stored.lstrip(b"\0")
                self._member = self._new()
            elif self._member.needs_input:
                block = self._raw.read(_STORED_BYTES)
                if not block:
                    raise EOFError("ends before its end-of-stream marker")
            data = self._member.decompress(block, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
