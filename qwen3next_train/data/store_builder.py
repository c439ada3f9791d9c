"""Tokenises a source's documents into one store, or into two by holding documents out; goes on after a kill.

After every batch of documents the journal says how far the stores are. A later call for the same source and the same
directory goes on there, and the stores are the same bit for bit: each document is encoded for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.build_journal import JOURNAL_NAME, Journal, Place
from qwen3next_train.data.documents import Document, cut_document, is_cut, read_documents
from qwen3next_train.data.left_out import LeftOuts, format_left_out
from qwen3next_train.data.progress import Progress
from qwen3next_train.data.reading import remove
from qwen3next_train.data.sources import FileSource
from qwen3next_train.data.store_meta import entry_name
from qwen3next_train.data.store_writer import StoreWriter, WrittenSoFar, lengths_path
from qwen3next_train.data.token_store import TokenStore, store_paths, token_dtype
from qwen3next_train.data.tokenization import GROUP_CHARS, Tokenizer
from qwen3next_train.errors import DataError
from qwen3next_train.log import get_logger

_START = Place(0, 0, {})


class _Part:
    """One of the two stores being written."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, resume: WrittenSoFar | None, num_bytes: int | None) -> None:
        self.prefix = prefix
        self.writer = StoreWriter(prefix, token_dtype(tokenizer.num_ids), resume=resume)
        self.num_bytes = num_bytes

    def append(self, document: Document, token_ids: npt.NDArray[np.int64], num_bytes: int) -> None:
        self.writer.append(token_ids)
        if document.token_ids is not None or self.num_bytes is None:
            self.num_bytes = None
        else:
            self.num_bytes += num_bytes


def build_stores(
    source: FileSource,
    tokenizer: Tokenizer,
    *,
    train_prefix: Path,
    validation_prefix: Path,
    held_out_fraction: float,
    skipped: LeftOuts,
    entry: str = "",
) -> float:
    """Tokenise all documents of a source, from where an earlier call was killed; return the seconds it took in all.

    A document is held out by the hash of its identity. When that leaves nothing to train on (a corpus of one or two
    documents), everything is for training. Of a single text file the end is held out. A part without documents is not
    written.

    Args:
        source: the files.
        tokenizer: how to encode them.
        train_prefix: where to write the store of the training documents, in a directory of this source, tokenizer
            and fraction alone.
        validation_prefix: where to write the store of the held-out documents, in the same directory.
        held_out_fraction: share of the documents, or of the single text, to hold out, 0 for none.
        skipped: counts the documents that are left out, by reason.
        entry: name of the cache's entry, recorded in both stores; empty for none.

    Raises:
        DataError: a document is broken, or there are none.
        StorageError: what was written before cannot be read now.
        OSError: writing fails.
    """
    journal_path = train_prefix.with_name(JOURNAL_NAME)
    journal = Journal.read(journal_path)
    prefixes = (train_prefix, validation_prefix)
    if journal is not None and journal.finished and _are_whole(prefixes):
        skipped.update(journal.place.left_out)
        _remove_lengths(prefixes)
        return journal.elapsed_s
    with ExitStack() as stack:
        resumed = None if journal is None else _reopen_parts(prefixes, tokenizer, journal, stack)
        if resumed is None or journal is None:
            if journal is not None:
                get_logger().info("%s: what an interrupted tokenization left is damaged; beginning anew", source.label)
            journal = None
            remove(journal_path)
            train, validation = parts = _new_parts(prefixes, tokenizer, stack)
        else:
            train, validation = parts = resumed
            get_logger().info(
                "%s: going on after %s documents that an interrupted tokenization has done",
                source.label,
                f"{train.writer.num_documents + validation.writer.num_documents:,}",
            )
        start = place = _START if journal is None else journal.place
        begins = _begins(source)
        progress = Progress(source.label, begins[-1], begins[start.file])
        stack.callback(progress.close)
        spent_s = 0.0 if journal is None else journal.elapsed_s

        def record(*, finished: bool) -> None:
            Journal(
                place,
                spent_s + progress.elapsed_s,
                finished,
                tuple(part.writer.written() for part in parts),
                tuple(part.num_bytes for part in parts),
            ).write(journal_path)

        text_bytes = 0
        for batch, behind in _batches(source, start, held_out_fraction, skipped):
            for document, token_ids in _encode_batch(batch, tokenizer):
                num_bytes = len(document.text.encode())
                part = validation if document.is_held_out(held_out_fraction) else train
                part.append(document, token_ids, num_bytes)
                text_bytes += num_bytes
            num_tokens = sum(part.writer.num_tokens for part in parts)
            progress.update(num_tokens, begins[behind.file] + batch[-1].position, text_bytes)
            place = behind
            record(finished=False)
        written = [part for part in parts if part.writer.num_documents]
        if not written:
            raise DataError(f"{source.label}: no documents ({format_left_out(skipped)}); check the source")
        for part, name in zip(written, ("train", "validation"), strict=False):
            part.writer.finish(
                source=source.label,
                tokenizer_fingerprint=tokenizer.fingerprint,
                num_bytes=part.num_bytes,
                entry=entry and entry_name(entry, name, len(written)),
            )
        if train not in written:
            for path, target in zip(store_paths(validation_prefix), store_paths(train_prefix), strict=True):
                path.replace(target)
        elif validation not in written:
            _discard(validation_prefix)
        place = replace(place, left_out=dict(skipped))
        record(finished=True)
    _remove_lengths(prefixes)
    return spent_s + progress.elapsed_s


def _reopen_parts(
    prefixes: tuple[Path, Path], tokenizer: Tokenizer, journal: Journal, stack: ExitStack
) -> tuple[_Part, _Part] | None:
    """Both stores, opened where the journal says; None when the files are not as it says."""
    with ExitStack() as opened:
        try:
            parts = []
            for prefix, store, num_bytes in zip(prefixes, journal.stores, journal.num_bytes, strict=True):
                parts.append(_Part(prefix, tokenizer, store, num_bytes))
                opened.enter_context(parts[-1].writer)
            train, validation = parts
        except (DataError, FileNotFoundError, ValueError):
            return None
        stack.push(opened.pop_all())
    return train, validation


def _new_parts(prefixes: tuple[Path, Path], tokenizer: Tokenizer, stack: ExitStack) -> tuple[_Part, _Part]:
    """Both stores, empty."""
    for prefix in prefixes:
        _discard(prefix)
    train, validation = (_Part(prefix, tokenizer, None, 0) for prefix in prefixes)
    for part in (train, validation):
        stack.enter_context(part.writer)
    return train, validation


def _are_whole(prefixes: tuple[Path, Path]) -> bool:
    """Whether the stores of a tokenisation that was killed after its end are intact."""
    try:
        for prefix in prefixes:
            if prefix == prefixes[0] or store_paths(prefix).idx.exists():
                TokenStore(prefix).check()
    except DataError:
        return False
    return True


def _batches(
    source: FileSource, start: Place, held_out_fraction: float, skipped: LeftOuts
) -> Iterator[tuple[list[Document], Place]]:
    """Documents behind ``start`` in batches that keep all cores busy, each with the place behind it."""
    batch: list[Document] = []
    num_chars = 0
    skipped.update(start.left_out)
    place = start
    for index in range(start.file, len(source.files)):
        left_out, number = dict(skipped), 0
        documents = read_documents(replace(source, files=(source.files[index],)), skipped)
        if is_cut(source, held_out_fraction):
            documents = (part for document in documents for part in cut_document(document, held_out_fraction))
        for document in documents:
            number += 1
            if index == start.file and number <= start.documents:
                continue
            batch.append(document)
            place = Place(index, number, left_out)
            num_chars += len(document.text) + len(document.token_ids or ())
            if num_chars >= GROUP_CHARS:
                yield batch, place
                batch, num_chars = [], 0
    if batch:
        yield batch, place


def _encode_batch(batch: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, npt.NDArray[np.int64]]]:
    encoded = tokenizer.encode_documents([document.text for document in batch if document.token_ids is None])
    for document in batch:
        if document.token_ids is None:
            yield document, next(encoded)
            continue
        if max(document.token_ids) >= tokenizer.num_ids:
            raise DataError(
                f"{document.where}: input_ids: {max(document.token_ids)} is not an id of the tokenizer, "
                f"which has {tokenizer.num_ids}; set data.tokenizer to the one that made them"
            )
        yield document, np.array(document.token_ids, dtype=np.int64)


def _begins(source: FileSource) -> list[int]:
    """Where each file begins among the stored bytes of all, then where the last one ends."""
    return [0, *accumulate(_size(file.path) for file in source.files)]


def _size(path: Path) -> int:
    """Stored bytes of a file; 0 where that cannot be told, which is said when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove_lengths(prefixes: tuple[Path, Path]) -> None:
    for prefix in prefixes:
        lengths_path(prefix).unlink(missing_ok=True)


def _discard(prefix: Path) -> None:
    """Remove what a writer has left."""
    for path in (*store_paths(prefix), lengths_path(prefix)):
        remove(path)
