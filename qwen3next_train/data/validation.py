"""Validation rows: fixed, in order, without overlap, the same work on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.data.digests import digest_of
from qwen3next_train.data.prepared import PreparedData, PreparedSource
from qwen3next_train.data.rows import read_row, read_tokens
from qwen3next_train.errors import DataError
from qwen3next_train.row_slices import WHOLE_ROW, RowSlice
from qwen3next_train.topology import Topology


def open_validation(prepared: PreparedData, config: Config) -> dict[str, ValidationData]:
    """What the validations of a run look at, by set; the one without a name comes first, under an empty name.

    Raises:
        DataError: a set has fewer tokens than a row; or nothing is held out and there are no named sets.
    """
    if not config.eval.interval:
        return {}
    names = list(prepared.validation_sets)
    if not names or config.data.validation_sources or config.data.validation_fraction:
        names.insert(0, "")
    return {name: ValidationData(prepared, config, num_rows=config.eval.rows, name=name) for name in names}


class ValidationData:
    """The rows a validation looks at: the same ones every time, at every world size.

    Rows do not overlap and start at the stream's first token. With several sources they are taken from each in turn
    until one is used up; from each source they are spread evenly, so that a few rows stand for all of it.
    With ``num_rows=None`` every token is in a row; the last row of each source is then filled up with documents of
    one token, which have no targets.

    Args:
        prepared: the opened sources.
        config: row settings.
        num_rows: rows to look at (fewer if there are not so many); None for everything.
        name: of the validation set; empty for the one without a name.

    Raises:
        DataError: there are no held-out documents, or fewer than one row of them.
    """

    def __init__(self, prepared: PreparedData, config: Config, *, num_rows: int | None, name: str = "") -> None:
        sources = prepared.validation_sets[name] if name else prepared.validation
        if not sources:
            raise DataError(
                "data.validation_fraction: no document was held out; name data.validation_sources, raise the "
                "fraction, or set eval.interval to 0"
            )
        self._sources = sources
        self._vocab_size = prepared.vocab_size
        self._sequence_length = config.data.sequence_length
        self._isolate_documents = config.data.isolate_documents
        if num_rows is None:
            counts = [-(-source.documents.num_tokens // self._sequence_length) for source in self._sources]
            chosen = counts
        else:
            counts = [(source.documents.num_tokens - 1) // self._sequence_length for source in self._sources]
            chosen = _share_out(num_rows, counts)
        if not any(chosen):
            largest = max(self._sources, key=lambda source: source.documents.num_tokens)
            of_set = f"data.validation_sets: {name}: " if name else ""
            raise DataError(
                f"{of_set}{largest.label}: {largest.documents.num_tokens} held-out tokens, a row needs "
                f"{self._sequence_length + 1}; hold out more or lower data.sequence_length"
            )
        self._rows = [
            (source, row * available // wanted)
            for source, available, wanted in zip(self._sources, counts, chosen, strict=True)
            for row in range(wanted)
        ]
        self.bytes_per_token = _bytes_per_token(self._sources, chosen)
        """UTF-8 bytes per token of the documents the rows are from, exact over each source; None if unknown."""
        self.digest = digest_of(
            self._sequence_length,
            self._isolate_documents,
            *(
                [source.fingerprint, source.documents.documents.start, source.documents.documents.stop, wanted]
                for source, wanted in zip(self._sources, chosen, strict=True)
            ),
        )
        """Of the rows: losses compare where it is the same."""

    @property
    def num_rows(self) -> int:
        """Rows that are looked at."""
        return len(self._rows)

    @property
    def unsized_source(self) -> str:
        """A source of these rows whose bytes are not known, as the user wrote it; empty where all are."""
        return next((source.label for source, _ in self._rows if source.num_bytes is None), "")

    def batches(
        self, topology: Topology, *, micro_batch_size: int, mtp_depths: int, part: RowSlice = WHOLE_ROW
    ) -> list[PackedBatch]:
        """This rank's micro-batches, as many as every other rank's.

        Micro-batch m of rank r holds rows ``[(m * W + r) * B, ... + B)``, or slices of them (``data.loader``). Where
        the rows run out, rows are repeated without targets, because all ranks must run the same number of forward
        passes.
        """
        stride = topology.data_parallel_size * micro_batch_size
        own = topology.data_parallel_rank * micro_batch_size
        return [
            self._batch(range(first + own, first + own + micro_batch_size), mtp_depths).cut(part)
            for first in range(0, self.num_rows, stride)
        ]

    def row(self, index: int) -> PackedRow:
        """The ``index``-th row.

        Raises:
            DataError: the store is damaged there.
        """
        source, number = self._rows[index]
        start = number * self._sequence_length
        if start + self._sequence_length >= source.documents.num_tokens:
            return self._last_row(source, start)
        return read_row(
            source.documents,
            start,
            sequence_length=self._sequence_length,
            vocab_size=self._vocab_size,
            isolate_documents=self._isolate_documents,
        )

    def _batch(self, indices: range, mtp_depths: int) -> PackedBatch:
        rows = [self.row(index % self.num_rows) for index in indices]
        batch = PackedBatch.from_rows(rows, mtp_depths=mtp_depths)
        real = [row for index, row in zip(indices, rows, strict=True) if index < self.num_rows]
        if len(real) == len(rows):
            return batch
        labels_T, *further = (targets_T.clone() for targets_T in (batch.labels_T, *batch.mtp_targets))
        for targets_T in (labels_T, *further):
            targets_T[len(real) * self._sequence_length :] = IGNORE_INDEX
        counts = PackedBatch.from_rows(real, mtp_depths=mtp_depths).num_targets if real else (0,) * (mtp_depths + 1)
        return replace(batch, labels_T=labels_T, mtp_targets=tuple(further), num_targets=counts)

    def _last_row(self, source: PreparedSource, start: int) -> PackedRow:
        """The tokens from ``start`` to the end of the stream, filled up with one-token documents."""
        documents, length = source.documents, self._sequence_length
        num_real = documents.num_tokens - start
        tokens = np.zeros(length + 1, dtype=np.int64)
        tokens[:num_real] = read_tokens(documents, start, documents.num_tokens, vocab_size=self._vocab_size)
        inner = np.empty(0, dtype=np.int64)
        if self._isolate_documents:
            inner = documents.document_starts_between(start + 1, documents.num_tokens) - start
        padding = np.arange(num_real, length)
        return PackedRow(tokens, np.concatenate([[0], inner, padding, [length]]), ends_inside_document=False)


def _share_out(num_rows: int, available: Sequence[int]) -> list[int]:
    """Take rows from the sources in turn until there are ``num_rows`` or none are left."""
    chosen = [0] * len(available)
    while num_rows > 0 and chosen != list(available):
        for index, limit in enumerate(available):
            if num_rows > 0 and chosen[index] < limit:
                chosen[index] += 1
                num_rows -= 1
    return chosen


def _bytes_per_token(sources: Sequence[PreparedSource], rows: Sequence[int]) -> float | None:
    """Mean over sources, weighted by rows."""
    total = 0.0
    for source, count in zip(sources, rows, strict=True):
        if count:
            if source.num_bytes is None:
                return None
            total += count * source.num_bytes / source.documents.num_tokens
    return total / sum(rows)
