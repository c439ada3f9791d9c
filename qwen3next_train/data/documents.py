"""Turns a source's files into documents, one at a time, in bounded memory; every error names file and line.

What a record may hold instead of text: nothing (``null``) is left out and counted; bytes are taken as UTF-8, and left
out and counted where they are not; anything else is an error, as is a record without the field. A text file whose
beginning has a NUL byte is none, as git has it: UTF-16 without its mark is UTF-8 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from qwen3next_train.data.folders import SourceFile
from qwen3next_train.data.formats import DAMAGED, ByteStream, FileFormat, Format, format_of
from qwen3next_train.data.left_out import LeftOuts, leave_out
from qwen3next_train.data.reading import read_error
from qwen3next_train.data.records import Record, damage, read_records
from qwen3next_train.data.sources import FileSource
from qwen3next_train.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""Longest document read into memory; a longer line or file is rejected instead of exhausting the machine."""

_MAX_TOKEN_ID = (1 << 31) - 1
_BEGINNING_BYTES = 8000
"""Of a text file that may have no NUL byte."""
_PLAIN_TEXT = FileFormat(Format.TEXT, None)


@dataclass(frozen=True)
class Document:
    """One document: either text or, from JSON only, ready token ids.

    Args:
        where: file, with line or row number where it has several documents, for messages.
        name: the same with the file's name in its source, wherever that lies.
        text: the text; empty for token ids.
        token_ids: ids to take as they are, nothing appended; None for text.
        identity: decides by its hash whether the document is held out: the file's name, or the content.
        position: stored bytes of the source read up to and with this document.
        held_out: whether it is held out; None: its hash decides.
    """

    where: str
    name: str
    text: str
    token_ids: list[int] | None
    identity: bytes
    position: int = 0
    held_out: bool | None = None

    def is_held_out(self, fraction: float) -> bool:
        """Whether the document belongs to the validation part of size ``fraction``, whatever else is in the corpus."""
        if self.held_out is not None:
            return self.held_out
        value = int.from_bytes(blake2b(self.identity, digest_size=8).digest(), "little")
        return value < int(fraction * (1 << 64))


def read_documents(source: FileSource, skipped: LeftOuts) -> Iterator[Document]:
    """All documents of a source in stored order.

    Args:
        source: the files.
        skipped: counts what was left out, by reason: ``empty``, ``null``, ``not UTF-8``, ``binary files``, ``files
            without documents``.

    Raises:
        DataError: a file is missing, or a line or row is broken (names file and line).
        StorageError: a file cannot be read now.
    """
    start = 0
    for file in source.files:
        try:
            num_found = 0
            for found in _read_file(source, file, start):
                num_found += 1
                if isinstance(found, _Without):
                    leave_out(skipped, found.reason, found.name)
                elif found.text or found.token_ids:
                    yield found
                else:
                    leave_out(skipped, "empty", found.name)
            if not num_found:
                leave_out(skipped, "files without documents", file.name)
            start += file.path.stat().st_size
        except OSError as error:
            raise read_error(file.path, error) from None


def is_cut(source: FileSource, held_out_fraction: float) -> bool:
    """Whether what is held out is the end of a document: of a single text file, which has no other documents."""
    return held_out_fraction > 0 and len(source.files) == 1 and not _format_of(source.files[0]).holds_records


def cut_document(document: Document, held_out_fraction: float) -> Iterator[Document]:
    """The beginning of a document, for training, and its end, which is held out.

    The cut is behind a line, else behind a space, at most half as far again from the end as the fraction says. A
    document that is too short for both parts stays whole.
    """
    text = document.text
    target = round(len(text) * (1 - held_out_fraction))
    if not 0 < target < len(text):
        yield document
        return
    lowest = target - min(target, len(text) - target) // 2
    cut = next((at + 1 for mark in ("\n", " ") if (at := text.rfind(mark, lowest, target)) >= 0), target)
    position = document.position * cut // len(text)
    yield replace(document, text=text[:cut], position=position, held_out=False)
    yield replace(document, text=text[cut:], held_out=True)


def _format_of(file: SourceFile) -> FileFormat:
    """How a file is read: one without suffix is text when the user has named it; no other is without a format."""
    return format_of(file.path.name) or _PLAIN_TEXT


@dataclass(frozen=True)
class _Without:
    """A document, or a whole file, that is left out, and why."""

    name: str
    reason: str


def _read_file(source: FileSource, file: SourceFile, start: int) -> Iterator[Document | _Without]:
    file_format = _format_of(file)
    if file_format.holds_records:
        for record in read_records(file.path, file_format, source.text_field, MAX_DOCUMENT_BYTES):
            yield _document_of_record(record, file, source.text_field, start)
    else:
        yield _read_text(file, file_format, source.lenient, start)


def _read_text(file: SourceFile, file_format: FileFormat, lenient: bool, start: int) -> Document | _Without:
    with ByteStream(file.path, file_format.compression) as stream:
        try:
            raw = stream.read(MAX_DOCUMENT_BYTES + 1)
        except (OSError, *DAMAGED) as error:
            raise damage(file.path, file_format, error) from None
        position = start + stream.position
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{file.path}: longer than {MAX_DOCUMENT_BYTES} bytes; a text file is one document, split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not lenient:
            raise DataError(f"{file.path}: not UTF-8 at byte {error.start}; convert the file") from None
        return _Without(file.name, "not UTF-8")
    if (zero := raw.find(b"\0", 0, _BEGINNING_BYTES)) >= 0:
        if not lenient:
            raise DataError(
                f"{file.path}: not text, byte {zero} is NUL; convert the file if it is UTF-16, else remove the byte"
            )
        return _Without(file.name, "binary files")
    return Document(str(file.path), file.name, text, None, file.name.encode("utf-8", "surrogateescape"), position)


def _document_of_record(record: Record, file: SourceFile, field: str, start: int) -> Document | _Without:
    where, fields, position = record.where, record.fields, start + record.position
    name = file.name + where.removeprefix(str(file.path))
    as_ids = field not in fields and "input_ids" in fields
    if field not in fields and not as_ids:
        raise DataError(f"{where}: no field {field!r}, found {sorted(fields)[:8]}; set text_field")
    value = fields["input_ids" if as_ids else field]
    if value is None:
        return _Without(name, "null")
    if as_ids:
        return Document(where, name, "", _checked_ids(value, where), record.raw, position)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return _Without(name, "not UTF-8")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r}: expected a string, found {type(value).__name__}; set text_field")
    try:
        content = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r}: lone surrogate at character {error.start}; repair the text"
        ) from None
    return Document(where, name, value, None, content, position)


def _checked_ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token <= _MAX_TOKEN_ID for token in ids):
        raise DataError(f"{where}: input_ids: expected a list of integers from 0 to {_MAX_TOKEN_ID}")
    return ids
