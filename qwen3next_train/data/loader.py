"""Batches of a run: which rows a step takes, who gets them, and preparing them ahead of time.

The data state is one integer, the number of consumed samples, valid at any world size, until the data changes at a
resume; then it counts from there, and ``data.position`` says where each source goes on::

    step       takes samples [consumed, consumed + G)                             G = global batch size
    micro-batch m of rank r   takes [consumed + (m * W + r) * B, ... + B)         W = ranks, B = micro-batch size
    sample i   -> (source, index) by the blend -> row by the source's sampler     pure functions of (seed, i)

With context parallelism W counts the groups of ranks that share a row and r is the group; every rank of a group makes
the whole rows and keeps its slice of each.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.data.blend import Blend
from qwen3next_train.data.position import DataStart, new_start
from qwen3next_train.data.prepared import PreparedData
from qwen3next_train.data.rows import RowSampler
from qwen3next_train.errors import DataError
from qwen3next_train.row_slices import WHOLE_ROW, RowSlice
from qwen3next_train.topology import Topology

_POLL_S = 0.1


class TrainingData:
    """Random access to the samples of a run.

    Args:
        prepared: the opened sources.
        config: seed and row settings.
        start: where each source goes on; None for a run whose data has never changed.

    Raises:
        DataError: a source is shorter than one row.
    """

    def __init__(self, prepared: PreparedData, config: Config, start: DataStart | None = None) -> None:
        if start is None:
            start = new_start(prepared, sequence_length=config.data.sequence_length, seed=config.run.seed)
        self._first_rows = [position.first_row for position in start.sources]
        self._blend = Blend([source.weight for source in prepared.train], seed=config.run.seed)
        self._labels = [source.label for source in prepared.train]
        self._samplers = []
        for position, source in zip(start.sources, prepared.train, strict=True):
            with _errors_of(source.label):
                sampler = RowSampler(
                    source.documents,
                    sequence_length=config.data.sequence_length,
                    vocab_size=prepared.vocab_size,
                    isolate_documents=config.data.isolate_documents,
                    seed=config.run.seed,
                    source_index=position.order,
                )
            self._samplers.append(sampler)

    def row(self, sample_index: int) -> PackedRow:
        """The row of a sample.

        Raises:
            DataError: the store is damaged there.
        """
        source, index = self._blend.locate(sample_index)
        with _errors_of(self._labels[source]):
            return replace(self._samplers[source].row(self._first_rows[source] + index), source=source)

    @property
    def rows_per_epoch(self) -> list[int]:
        """Rows of one pass over each source."""
        return [sampler.num_rows for sampler in self._samplers]


@contextmanager
def _errors_of(label: str) -> Iterator[None]:
    """Begin data errors with the source as the user wrote it: a path in the cache says nothing of it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{label}: {error}") from error


class StepLoader:
    """This rank's micro-batches, step by step, prepared ahead in a thread. Close it or use it in a ``with``.

    Args:
        data: the samples.
        topology: this rank's place.
        batch_sizes: samples of each step over all ranks, multiples of world size times micro-batch size, without end.
        micro_batch_size: samples per rank and micro-batch.
        mtp_depths: MTP depths there are targets for.
        start_sample: samples consumed before the first step; any number.
        num_prefetch_steps: steps prepared ahead; 0 prepares each when it is asked for.
        part: this rank's slice of every row.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        topology: Topology,
        batch_sizes: Iterable[int],
        micro_batch_size: int,
        mtp_depths: int,
        start_sample: int,
        num_prefetch_steps: int,
        part: RowSlice = WHOLE_ROW,
    ) -> None:
        steps = _steps(
            data,
            topology=topology,
            batch_sizes=batch_sizes,
            micro_batch_size=micro_batch_size,
            mtp_depths=mtp_depths,
            start_sample=start_sample,
            part=part,
        )
        self.last_wait_s = 0.0
        """Seconds the last step was waited for."""
        self._steps = _Prefetcher(steps, num_prefetch_steps) if num_prefetch_steps else steps

    def __iter__(self) -> Self:
        """Return the loader, an endless iterator."""
        return self

    def __next__(self) -> list[PackedBatch]:
        """The next step's micro-batches of this rank.

        Raises:
            DataError: a store is damaged; raised at the step that would use it, also when found ahead of time.
        """
        started_at = time.monotonic()
        batches = next(self._steps)
        self.last_wait_s = time.monotonic() - started_at
        return batches

    def close(self) -> None:
        """Stop the thread and wait for it; a closed loader yields no more steps."""
        self._steps.close()

    def __enter__(self) -> Self:
        """Return the loader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the loader."""
        self.close()


def _steps(
    data: TrainingData,
    *,
    topology: Topology,
    batch_sizes: Iterable[int],
    micro_batch_size: int,
    mtp_depths: int,
    start_sample: int,
    part: RowSlice,
) -> Generator[list[PackedBatch], None, None]:
    stride = topology.data_parallel_size * micro_batch_size
    own = topology.data_parallel_rank * micro_batch_size
    for size in batch_sizes:
        assert size % stride == 0
        firsts = range(start_sample + own, start_sample + own + size, stride)
        yield [
            PackedBatch.from_rows(
                [data.row(sample) for sample in range(first, first + micro_batch_size)], mtp_depths=mtp_depths
            ).cut(part)
            for first in firsts
        ]
        start_sample += size


class _Prefetcher:
    """Runs an iterator in a daemon thread, a bounded number of items ahead; errors surface at their item."""

    def __init__(self, items: Iterator[list[PackedBatch]], depth: int) -> None:
        self._queue: queue.Queue[list[PackedBatch] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread must not keep this object alive, or a forgotten loader would never stop.
        self._thread = threading.Thread(
            target=_fill, args=(items, self._queue, self._stop), name="data-prefetch", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> list[PackedBatch]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._stop.set()
                raise item
            return item
        raise StopIteration

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _fill(
    items: Iterator[list[PackedBatch]], filled: queue.Queue[list[PackedBatch] | BaseException], stop: threading.Event
) -> None:
    while not stop.is_set():
        item: list[PackedBatch] | BaseException
        try:
            item = next(items)
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to the consumer
            item = error
        while not stop.is_set():
            try:
                filled.put(item, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
