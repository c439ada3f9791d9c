"""Sequence packing: cuts a stream of documents into full rows; row ``j`` of epoch ``e`` depends on (seed, j, e) only.

The documents of a source, in stored order, form one stream of tokens (each document ends with its end-of-document
token). Epoch ``e`` cuts it into rows of S tokens after an offset in ``[0, S)`` that changes from epoch to epoch,
and visits the rows in the order of a keyed permutation. Every row is full: no padding, no token is dropped except
fewer than 2 S at the two ends, no token is seen twice in an epoch, all epochs have the same number of rows.

What that costs: rows cut documents. With an average document of L tokens a row starts inside one with
probability ``1 - 1 / L``, and the rest of that document is trained without what came before it in the previous
row: about one document per row loses its context (S = 4096, L = 5000: nearly every document is cut once; S = 4096,
L = 500: one in eight). The changing offset puts the cuts elsewhere in each epoch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen3next_train.batch import PackedRow
from qwen3next_train.data.permutation import derive_key, permuted
from qwen3next_train.data.token_store import DocumentRange
from qwen3next_train.errors import DataError


def read_row(
    documents: DocumentRange, start: int, *, sequence_length: int, vocab_size: int, isolate_documents: bool
) -> PackedRow:
    """Read the row of S tokens at position ``start`` of a stream, with the token after it.

    Args:
        documents: the stream; holds at least ``start + sequence_length + 1`` tokens.
        start: position of the row's first token.
        sequence_length: S.
        vocab_size: every id must be below it.
        isolate_documents: False makes the whole row one document.

    Raises:
        DataError: a token id is out of range (names file and position), or the file cannot be read.
    """
    stop = start + sequence_length
    tokens = read_tokens(documents, start, stop + 1, vocab_size=vocab_size)
    if not isolate_documents:
        return PackedRow(tokens, np.array([0, sequence_length]), ends_inside_document=True)
    starts = documents.document_starts_between(start + 1, stop + 1) - start
    ends_inside_document = not (len(starts) and starts[-1] == sequence_length)
    inner = starts if ends_inside_document else starts[:-1]
    return PackedRow(tokens, np.concatenate([[0], inner, [sequence_length]]), ends_inside_document)


def read_tokens(documents: DocumentRange, start: int, stop: int, *, vocab_size: int) -> npt.NDArray[np.int64]:
    """Tokens ``[start, stop)`` of a stream, checked against the vocabulary: int64 ``[stop - start]``.

    Raises:
        DataError: a token id is out of range (names file and position), or the file cannot be read.
    """
    tokens = documents.read(start, stop)
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise DataError(
            f"{documents.store.bin_path}: token {documents.position_in_store(start + at)}: expected an id from 0 to "
            f"{vocab_size - 1}, found {tokens[at]}; the store is damaged or made with another tokenizer"
        )
    return tokens


class RowSampler:
    """The endless, epoch-wise shuffled sequence of rows of one source. Holds no state and no index.

    Args:
        documents: the source's stream.
        sequence_length: S, tokens per row.
        vocab_size: every id must be below it.
        isolate_documents: False makes every row one document.
        seed: of the run.
        source_index: number of the source (``SourcePosition.order``), so that sources are shuffled independently.

    Raises:
        DataError: the stream is shorter than one row and the token after it.
    """

    def __init__(
        self,
        documents: DocumentRange,
        *,
        sequence_length: int,
        vocab_size: int,
        isolate_documents: bool,
        seed: int,
        source_index: int,
    ) -> None:
        require_one_row(documents, sequence_length)
        self._documents = documents
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._isolate_documents = isolate_documents
        self._seed = seed
        self._source_index = source_index
        self.num_rows = rows_per_epoch(documents.num_tokens, sequence_length)
        """Rows per epoch."""
        self._num_offsets = min(sequence_length, documents.num_tokens - self.num_rows * sequence_length)

    def row_start(self, index: int) -> int:
        """Position in the stream of the ``index``-th row since the start of training."""
        epoch, row = divmod(index, self.num_rows)
        offset = derive_key(self._seed, "offset", self._source_index, epoch)[0] % self._num_offsets
        key = derive_key(self._seed, "rows", self._source_index, epoch)
        return offset + permuted(row, self.num_rows, key) * self._sequence_length

    def row(self, index: int) -> PackedRow:
        """The ``index``-th row since the start of training.

        Raises:
            DataError: the store is damaged there.
        """
        return read_row(
            self._documents,
            self.row_start(index),
            sequence_length=self._sequence_length,
            vocab_size=self._vocab_size,
            isolate_documents=self._isolate_documents,
        )


def rows_per_epoch(num_tokens: int, sequence_length: int) -> int:
    """Rows of one pass over a stream of ``num_tokens``."""
    return max(1, (num_tokens - sequence_length) // sequence_length)


def require_one_row(documents: DocumentRange, sequence_length: int) -> None:
    """Reject a stream that cannot fill one row.

    Raises:
        DataError: fewer than ``sequence_length + 1`` tokens.
    """
    if documents.num_tokens <= sequence_length:
        raise DataError(
            f"{documents.num_tokens} tokens, a row needs {sequence_length + 1}; add text or lower data.sequence_length"
        )
