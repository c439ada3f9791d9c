"""Reads the documents of a source's files, one at a time, in bounded memory; every error names file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

from qwen3next_train.data.sources import FileSource, SourceFile
from qwen3next_train.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""Longest document read into memory; a longer line or file is rejected instead of exhausting the machine."""

_ROWS_PER_BATCH = 1024
_MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True)
class Document:
    """One document: either text or, from ``.jsonl`` only, ready token ids.

    Args:
        where: file, with line or row number where it has several documents, for messages.
        text: the text; empty for token ids.
        token_ids: ids to take as they are, nothing appended; None for text.
        identity: decides by its hash whether the document is held out: the file's name, or the content.
    """

    where: str
    text: str
    token_ids: list[int] | None
    identity: bytes

    def is_held_out(self, fraction: float) -> bool:
        """Whether the document belongs to the validation part of size ``fraction``, whatever else is in the corpus."""
        value = int.from_bytes(blake2b(self.identity, digest_size=8).digest(), "little")
        return value < int(fraction * (1 << 64))


def read_documents(source: FileSource, skipped: Counter[str]) -> Iterator[Document]:
    """All documents of a source in stored order.

    Args:
        source: the files.
        skipped: counts what was left out, by reason: ``empty``, ``not UTF-8``.

    Raises:
        DataError: a file cannot be read, or a line or row is broken (names file and line).
    """
    for file in source.files:
        for document in _read_file(source, file, skipped):
            if document.text or document.token_ids:
                yield document
            else:
                skipped["empty"] += 1


def _read_file(source: FileSource, file: SourceFile, skipped: Counter[str]) -> Iterator[Document]:
    name = file.path.name
    try:
        if name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
            yield from _read_json_lines(file.path, source.text_field)
        elif name.endswith(".parquet"):
            yield from _read_parquet(file.path, source.text_field)
        elif name.endswith(".arrow"):
            yield from _read_arrow(file.path, source.text_field)
        else:
            yield from _read_text(file, source.lenient, skipped)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror or error})") from None


def _read_text(file: SourceFile, lenient: bool, skipped: Counter[str]) -> Iterator[Document]:
    with file.path.open("rb") as stream:
        raw = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{file.path}: longer than {MAX_DOCUMENT_BYTES} bytes; a text file is one document, split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not lenient:
            raise DataError(f"{file.path}: not UTF-8 at byte {error.start}; convert the file") from None
        skipped["not UTF-8"] += 1
        return
    yield Document(str(file.path), text, None, file.name.encode("utf-8", "surrogateescape"))


def _read_json_lines(path: Path, field: str) -> Iterator[Document]:
    with _open_bytes(path) as stream:
        number = 0
        while True:
            number += 1
            try:
                line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}:{number}: damaged gzip file ({error})") from None
            if not line:
                return
            if len(line) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{path}:{number}: line longer than {MAX_DOCUMENT_BYTES} bytes; split it")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _document_of_line(line, field, f"{path}:{number}")


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _document_of_line(line: bytes, field: str, where: str) -> Document:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if field not in value and "input_ids" in value:
        return Document(where, "", _checked_ids(value["input_ids"], where), line.strip())
    if field not in value:
        raise DataError(f"{where}: no field {field!r}, found {sorted(value)[:8]}; set text_field")
    return _document_of_value(value[field], field, where)


def _checked_ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token <= _MAX_TOKEN_ID for token in ids):
        raise DataError(f"{where}: input_ids: expected a list of integers from 0 to {_MAX_TOKEN_ID}")
    return ids


def _document_of_value(text: Any, field: str, where: str) -> Document:
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r}: expected a string, found {type(text).__name__}")
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r}: lone surrogate at character {error.start}; repair the text"
        ) from None
    return Document(where, text, None, content)


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require_column(path, field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[field]):
                yield from _documents_of_column(batch.column(0), field, path, row)
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged parquet file at row {row} ({_first_line(error)})") from None


def _read_arrow(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            for batch in _arrow_batches(mapped):
                _require_column(path, field, batch.schema.names)
                yield from _documents_of_column(batch.column(field), field, path, row)
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged arrow file at row {row} ({_first_line(error)})") from None


def _arrow_batches(mapped: Any) -> Iterator[Any]:
    """Record batches of either IPC format: the file format has a magic at both ends, the stream format none."""
    import pyarrow.ipc

    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if not is_file:
        yield from pyarrow.ipc.open_stream(mapped)
        return
    reader = pyarrow.ipc.open_file(mapped)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _documents_of_column(column: Any, field: str, path: Path, first_row: int) -> Iterator[Document]:
    for index, value in enumerate(column):
        where = f"{path}:row {first_row + index}"
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise DataError(f"{where}: field {field!r}: not UTF-8") from None
        yield _document_of_value(text, field, where)


def _require_column(path: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{path}: no column {field!r}, found {names[:8]}; set text_field")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
