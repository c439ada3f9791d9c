"""Reads the records of files that hold many documents, one at a time, in bounded memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.data.formats import DAMAGED, ByteStream, FileFormat, Format
from qwen3next_train.errors import DataError

_ROWS_PER_BATCH = 1024
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One line, element or row.

    Args:
        where: file with line, item or row number, for messages.
        fields: what it holds; of a table's row only the column that was asked for.
        raw: the line or element as it is stored; empty for a table's row.
        position: bytes of the stored file read so far.
    """

    where: str
    fields: dict[str, Any]
    raw: bytes
    position: int


def read_records(path: Path, file_format: FileFormat, field: str, max_bytes: int) -> Iterator[Record]:
    """All records of a file in stored order.

    Args:
        path: the file.
        file_format: of the file, not text.
        field: column to read; of JSON all fields are read.
        max_bytes: longest line, element or CSV field that is read into memory.

    Raises:
        DataError: the file is damaged, not what its name says, or has no such column.
        OSError: it cannot be read.
    """
    if file_format.kind is Format.PARQUET:
        yield from _read_parquet(path, field)
        return
    if file_format.kind is Format.ARROW:
        yield from _read_arrow(path, field)
        return
    with ByteStream(path, file_format.compression) as stream:
        if file_format.kind is Format.JSON:
            yield from _read_json(path, file_format, stream, field, max_bytes)
        else:
            yield from _read_csv(path, file_format, stream, field, max_bytes)


def damage(path: Path | str, file_format: FileFormat, error: Exception) -> DataError:
    """The error for a compressed file that cannot be decompressed; ``error`` itself where the system failed.

    Raises:
        OSError: the file could not be read, so that nothing is known about its content.
    """
    if isinstance(error, OSError) and (error.errno is not None or file_format.compression is None):
        raise error
    return DataError(f"{path}: damaged {file_format.compression} file ({error}); replace it")


def _lines(
    path: Path, file_format: FileFormat, stream: ByteStream, max_bytes: int, *, number: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, counted from 1, or on from ``number``."""
    while True:
        number += 1
        try:
            line = stream.readline(max_bytes + 1)
        except (OSError, *DAMAGED) as error:
            raise damage(f"{path}:{number}", file_format, error) from None
        if not line:
            return
        if len(line) > max_bytes:
            raise DataError(f"{path}:{number}: line longer than {max_bytes} bytes; split it")
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _read_json(path: Path, file_format: FileFormat, stream: ByteStream, field: str, max_bytes: int) -> Iterator[Record]:
    blank_lines = 0
    try:
        # White space before the first character, however much.
        while (start := stream.peek()) and not start.removeprefix(_BOM).strip():
            blank_lines += stream.read(len(start)).count(b"\n")
    except (OSError, *DAMAGED) as error:
        raise damage(f"{path}:{blank_lines + 1}", file_format, error) from None
    if start.removeprefix(_BOM).lstrip().startswith(b"["):
        yield from _read_array(path, file_format, stream, field, max_bytes)
        return
    for number, line in _lines(path, file_format, stream, max_bytes, number=blank_lines):
        stripped = line.strip()
        if stripped:
            where = f"{path}:{number}"
            yield Record(where, _object(_parse(line, where), stripped, field, where), stripped, stream.position)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({json_problem(error)}); repair or remove it") from None


def _object(value: Any, raw: bytes, field: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected a JSON object, found {type(value).__name__}; "
            f'write it as {{"{field}": ...}} or remove it'
        )
    for name in (field, "input_ids"):
        # Of two fields of a name json takes the last. The count is quick, and of what is nested elsewhere too.
        if raw.count(json.dumps(name, ensure_ascii=False).encode()) > 1:
            _require_one(where, "fields", name, [key for key, _ in json.loads(raw, object_pairs_hook=list)])
    return value


def _read_array(
    path: Path, file_format: FileFormat, stream: ByteStream, field: str, max_bytes: int
) -> Iterator[Record]:
    """Elements of one array, which may be larger than memory."""
    elements = _Elements(path, file_format, stream, max_bytes)
    elements.expect("[")
    is_first = True
    while not elements.at("]"):
        if not is_first:
            elements.expect(",")
        is_first = False
        yield elements.next(field)
    elements.expect("]")
    if elements.peek():
        raise DataError(f"{path}: text after the array's end; a file holds one array, or an object a line")


class _Elements:
    """A cursor over the text of an array. Arguments as for :func:`_read_array`."""

    def __init__(self, path: Path, file_format: FileFormat, stream: ByteStream, max_bytes: int) -> None:
        self._path, self._format, self._stream, self._max_bytes = path, file_format, stream, max_bytes
        self._decoder = json.JSONDecoder()
        self._number = 0
        self._rest = b""
        self._started = self._ended = False
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is not white space, not consumed; empty at the file's end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK_BYTES):
                return ""

    def at(self, character: str) -> bool:
        """Whether ``character`` comes next."""
        return self.peek() == character

    def expect(self, character: str) -> None:
        """Consume ``character``."""
        found = self.peek()
        if found != character:
            shown = repr(found) if found else "the file's end"
            raise DataError(f"{self._path}:item {self._number}: not a JSON array: expected {character!r}, got {shown}")
        self._at += 1

    def next(self, field: str) -> Record:
        """The next element, which holds at most one ``field``."""
        where = f"{self._path}:item {self._number}"
        self.peek()
        size = _CHUNK_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # Cut off in the middle, or wrong: only more of the file tells. Twice as much each time, so that a
                # long element is not parsed again and again.
                is_cut = isinstance(error, json.JSONDecodeError)
                if is_cut and len(self._text) - self._at <= self._max_bytes and self._more(size):
                    size *= 2
                    continue
                raise DataError(f"{where}: not a JSON object ({json_problem(error)}); repair or remove it") from None
            if end == len(self._text) and self._more(_CHUNK_BYTES):
                continue  # a number may go on
            break
        raw = self._text[self._at : end].encode("utf-8", "surrogatepass")
        self._at = end
        self._number += 1
        return Record(where, _object(value, raw, field, where), raw, self._stream.position)

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        try:
            chunk = self._stream.read(size)
            if not self._started:
                chunk = chunk.removeprefix(_BOM)
        except (OSError, *DAMAGED) as error:
            raise damage(f"{self._path}:item {self._number}", self._format, error) from None
        self._started, self._ended = True, not chunk
        self._decode(chunk)
        return True

    def _decode(self, chunk: bytes) -> None:
        raw = self._rest + chunk
        try:
            text, used = raw.decode("utf-8"), len(raw)
        except UnicodeDecodeError as error:
            if chunk and error.end == len(raw) and "unexpected end" in error.reason:
                text, used = raw[: error.start].decode("utf-8"), error.start
            else:
                raise DataError(f"{self._path}:item {self._number}: not UTF-8; convert the file") from None
        self._rest = raw[used:]
        self._text = self._text[self._at :] + text
        self._at = 0


def _read_csv(path: Path, file_format: FileFormat, stream: ByteStream, field: str, max_bytes: int) -> Iterator[Record]:
    first, number = 1, 0

    def decoded() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path, file_format, stream, max_bytes):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line; convert the file"
                ) from None

    # For the whole process, which reads CSV nowhere else; the default is 128 kB.
    csv.field_size_limit(max_bytes)
    # Strict, or a quote that is never closed takes the rest of the file for one field.
    rows = csv.reader(decoded(), "excel-tab" if file_format.kind is Format.TSV else "excel", strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        _require_column(path, field, header)
        column = header.index(field)
        first = number + 1
        for row in rows:
            where, first = f"{path}:{first}", number + 1
            if row and len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields, the header has {len(header)}; repair the row")
            if row:
                yield Record(where, {field: row[column]}, b"", stream.position)
    except csv.Error as error:
        begun = f", in the row that begins in line {first}" if first < number else ""
        kind = file_format.kind.value.upper()
        raise DataError(f"{path}:{number}: not {kind}{begun}: {_csv_problem(error)}") from None


def _csv_problem(error: csv.Error) -> str:
    text = str(error)
    if text.startswith("new-line character"):
        return "a line ends with a bare carriage return; end lines with line feeds (tr '\\r' '\\n')"
    if text == "unexpected end of data":
        return "a quote is not closed before the file's end; close it, or double it if it belongs to the text"
    if "expected after" in text:
        return "text behind a closing quote; double quotes that belong to the text"
    if text.startswith("field larger"):
        return "a field is too long, or its quote is not closed; split the field or close it"
    return f"{text}; repair the row"


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    row, num_bytes = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require_column(path, field, table.schema_arrow.names)
            num_rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[field]):
                position = num_bytes * min(row + batch.num_rows, num_rows) // num_rows
                yield from _records_of_column(batch.column(0), field, path, row, position)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _table_damage(path, "parquet", row, error) from None


def _read_arrow(path: Path, field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            for batch in _arrow_batches(mapped, path, field):
                yield from _records_of_column(batch.column(field), field, path, row, mapped.tell())
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _table_damage(path, "arrow", row, error) from None


def _table_damage(path: Path, kind: str, row: int, error: Exception) -> DataError:
    """The error for a parquet or arrow file; ``error`` itself where the system failed, which alone has a number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return DataError(f"{path}: damaged {kind} file at row {row} ({_first_line(error)}); replace it")


_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What ends a stream; every message of one begins with the first half."""


def _arrow_batches(mapped: Any, path: Path, field: str) -> Iterator[Any]:
    """Record batches of either IPC format: the file format has a magic at both ends, the stream format none.

    Raises:
        DataError: there is not one column ``field``, which also a table without rows says.
    """
    import pyarrow.ipc

    start = mapped.read(6)
    mapped.seek(0)
    if start != b"ARROW1":
        stream = pyarrow.ipc.open_stream(mapped)
        _require_column(path, field, stream.schema.names)
        yield from stream
        # The format lets a stream end without its marker, but so does a file that is cut between two batches. Streams
        # of before Arrow 0.15 begin otherwise and end with four zeros.
        if start.startswith(_ARROW_END[:4]):
            end = mapped.tell()
            mapped.seek(max(0, end - len(_ARROW_END)))
            if mapped.read() != _ARROW_END:
                raise pyarrow.ArrowInvalid("no end-of-stream marker at the file's end")
        return
    reader = pyarrow.ipc.open_file(mapped)
    _require_column(path, field, reader.schema.names)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _records_of_column(column: Any, field: str, path: Path, first_row: int, position: int) -> Iterator[Record]:
    for index, value in enumerate(column):
        where = f"{path}:row {first_row + index}"
        try:
            yield Record(where, {field: value.as_py()}, b"", position)
        except UnicodeDecodeError:
            raise DataError(f"{where}: field {field!r}: not UTF-8") from None


def _require_column(path: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise DataError(f"{path}: no column {field!r}, found {names[:8]}; set text_field")
    _require_one(str(path), "columns", field, names)


def _require_one(where: str, what: str, name: str, names: list[str]) -> None:
    if names.count(name) > 1:
        raise DataError(f"{where}: {names.count(name)} {what} {name!r}; rename all but one")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
