"""Tokenises a source's documents into one store, or into two by holding documents out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.documents import Document, read_documents
from qwen3next_train.data.progress import Progress
from qwen3next_train.data.sources import FileSource
from qwen3next_train.data.store_writer import StoreWriter
from qwen3next_train.data.token_store import store_paths, token_dtype
from qwen3next_train.data.tokenization import GROUP_CHARS, Tokenizer
from qwen3next_train.errors import DataError


class _Part:
    """One of the two stores being written."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix = prefix
        self.writer = StoreWriter(prefix, token_dtype(tokenizer.num_ids))
        self.num_bytes: int | None = 0

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
    skipped: Counter[str],
) -> float:
    """Tokenise all documents of a source; return the seconds it took.

    A document is held out by the hash of its identity. When that leaves nothing to train on (a corpus of one or two
    documents), everything is for training. A part without documents is not written.

    Args:
        source: the files.
        tokenizer: how to encode them.
        train_prefix: where to write the store of the training documents.
        validation_prefix: where to write the store of the held-out documents.
        held_out_fraction: share of the documents to hold out, 0 for none.
        skipped: counts the documents that are left out, by reason.

    Raises:
        DataError: a document is broken, or there are none.
        OSError: writing fails.
    """
    progress = Progress(source.label)
    with ExitStack() as stack:
        train, validation = (_Part(prefix, tokenizer) for prefix in (train_prefix, validation_prefix))
        for part in (train, validation):
            stack.enter_context(part.writer)
        stack.callback(progress.close)
        total_bytes = 0
        for document, token_ids in _encoded(source, tokenizer, skipped):
            num_bytes = len(document.text.encode())
            part = validation if document.is_held_out(held_out_fraction) else train
            part.append(document, token_ids, num_bytes)
            total_bytes += num_bytes
            progress.update(train.writer.num_tokens + validation.writer.num_tokens, total_bytes)
        written = [part for part in (train, validation) if part.writer.num_documents]
        if not written:
            raise DataError(
                f"{source.label}: no documents ({format_left_out(skipped) or 'no lines'}); check data.sources"
            )
        for part in written:
            part.writer.finish(
                source=source.label, tokenizer_fingerprint=tokenizer.fingerprint, num_bytes=part.num_bytes
            )
    if train not in written:
        for path, target in zip(store_paths(validation_prefix), store_paths(train_prefix), strict=True):
            path.replace(target)
    elif validation not in written:
        _discard(validation_prefix)
    return progress.elapsed_s


def _encoded(
    source: FileSource, tokenizer: Tokenizer, skipped: Counter[str]
) -> Iterator[tuple[Document, npt.NDArray[np.int64]]]:
    """Documents with their token ids, in order, encoded in batches."""
    batch: list[Document] = []
    num_chars = 0
    for document in read_documents(source, skipped):
        batch.append(document)
        num_chars += len(document.text) + len(document.token_ids or ())
        if num_chars >= GROUP_CHARS:
            yield from _encode_batch(batch, tokenizer)
            batch, num_chars = [], 0
    yield from _encode_batch(batch, tokenizer)


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


def _discard(prefix: Path) -> None:
    """Remove what a writer without documents left."""
    for path in (*store_paths(prefix), prefix.with_name(prefix.name + ".lengths")):
        path.unlink(missing_ok=True)


def format_left_out(skipped: Mapping[str, int]) -> str:
    """Documents that were left out, by reason, in one line."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
