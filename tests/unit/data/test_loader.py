from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.data.loader import StepLoader, TrainingData
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.errors import DataError
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.topology import Topology
from tests.unit.data.corpus import counting_store, make_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    counting_store(tmp_path / "a", [7, 20, 3, 400, 1, 1, 90] * 4)
    counting_store(tmp_path / "b", [50] * 10)
    sources = [{"source": str(tmp_path / "a"), "weight": 3.0}, {"source": str(tmp_path / "b")}]
    return make_config(tmp_path / "cache", sources)


@pytest.fixture
def data(config: Config) -> TrainingData:
    return TrainingData(prepare_stores(config), config)


def loader(
    data: TrainingData,
    *,
    world: int = 1,
    rank: int = 0,
    micro: int = 2,
    start: int = 0,
    prefetch: int = 2,
    batch: int | Iterable[int] = 8,
) -> StepLoader:
    return StepLoader(
        data,
        topology=Topology(world, rank),
        batch_sizes=itertools.repeat(batch) if isinstance(batch, int) else batch,
        micro_batch_size=micro,
        mtp_depths=1,
        start_sample=start,
        num_prefetch_steps=prefetch,
    )


def take(steps: StepLoader, count: int) -> list[list[PackedBatch]]:
    with steps:
        return [next(steps) for _ in range(count)]


def rows_of(batches: list[PackedBatch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.input_ids_T.view(batch.num_rows, -1).tolist()]


def test_first_rows_never_change(data: TrainingData) -> None:
    found = [(int(row.tokens[0]), row.boundaries.tolist()) for row in map(data.row, (*range(8), 10**6))]
    assert found == [
        (1499, [0, 16]),
        (827, [0, 16]),
        (731, [0, 16]),
        (139, [0, 16]),
        (395, [0, 16]),
        (288, [0, 12, 16]),
        (107, [0, 16]),
        (368, [0, 16]),
        (162, [0, 16]),
    ]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_global_batches_are_the_same_at_any_world_size(data: TrainingData, prefetch: int) -> None:
    expected = [[tuple(data.row(8 * s + k).tokens[:-1].tolist()) for k in range(8)] for s in range(3)]
    for world in (1, 2, 4):
        for micro in (1, 2):
            ranks = [take(loader(data, world=world, rank=r, micro=micro, prefetch=prefetch), 3) for r in range(world)]
            for step in range(3):
                rows = [rows_of(ranks[rank][step]) for rank in range(world)]
                interleaved = [
                    row
                    for m in range(8 // world // micro)
                    for rank in range(world)
                    for row in rows[rank][m * micro : (m + 1) * micro]
                ]
                assert interleaved == expected[step]


def test_resumes_at_any_sample_and_batch_size(data: TrainingData) -> None:
    ((batches,),) = (take(loader(data, start=13, batch=4), 1),)
    assert rows_of(batches) == [tuple(data.row(13 + k).tokens[:-1].tolist()) for k in range(4)]
    straight = [rows_of(step) for step in take(loader(data), 5)]
    resumed = [rows_of(step) for step in take(loader(data), 2) + take(loader(data, start=16), 3)]
    assert resumed == straight


def test_rows_say_which_source_they_are_from(data: TrainingData) -> None:
    batches = [batch for step in take(loader(data), 4) for batch in step]
    assert len({batch.sources for batch in batches}) > 1
    for batch in batches:
        # Of the second store no token is above 499, of the first most are.
        largest = batch.input_ids_T.view(2, -1).max(dim=1).values
        assert all(source == 0 for source, token in zip(batch.sources, largest.tolist(), strict=True) if token > 499)
    numbers = [source for batch in batches for source in batch.sources]
    assert numbers == [data.row(index).source for index in range(len(numbers))]
    assert 0.6 < numbers.count(0) / len(numbers) < 0.9


def test_batches_carry_documents_and_targets(data: TrainingData) -> None:
    ((batch, *_),) = take(loader(data), 1)
    rows = [data.row(0), data.row(1)]
    expected = PackedBatch.from_rows(rows, mtp_depths=1)
    assert torch.equal(batch.cu_seqlens_cpu, expected.cu_seqlens_cpu)
    assert torch.equal(batch.labels_T, expected.labels_T)
    assert batch.num_targets == expected.num_targets
    assert len(batch.num_targets) == 2


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_context_group_have_slices_of_the_same_rows(data: TrainingData, size: int) -> None:
    """Tokens, labels, MTP's targets and positions put together are those of one rank with the group's rows."""
    groups = 4 // size

    def steps_of(rank: int) -> list[list[PackedBatch]]:
        topology = Topology(4, rank, context_parallel_size=size)
        steps = StepLoader(
            data,
            topology=topology,
            batch_sizes=itertools.repeat(8),
            micro_batch_size=2,
            mtp_depths=1,
            start_sample=0,
            num_prefetch_steps=2,
            part=RowSlice(topology.context_parallel_rank, size, halo=3),
        )
        return take(steps, 2)

    ranks = [steps_of(rank) for rank in range(4)]
    for group in range(groups):
        whole = take(loader(data, world=groups, rank=group), 2)
        for step, batches in enumerate(whole):
            for micro, batch in enumerate(batches):
                slices = [ranks[group * size + index][step][micro] for index in range(size)]
                for name in ("input_ids_T", "labels_T", "positions_U"):
                    together = torch.cat([getattr(own, name).view(2, -1) for own in slices], dim=1)
                    assert torch.equal(together.flatten(), getattr(batch, name)), name
                further = torch.cat([own.mtp_targets[0].view(2, -1) for own in slices], dim=1)
                assert torch.equal(further.flatten(), batch.mtp_targets[0])
                for depth, count in enumerate(batch.num_targets):
                    assert sum(own.num_targets[depth] for own in slices) == count
                assert sum(own.sum_squared_lengths for own in slices) == batch.sum_squared_lengths


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_growing_size_take_one_sample_after_the_other(data: TrainingData, world: int) -> None:
    ranks = [take(loader(data, world=world, rank=rank, micro=1, batch=[2, 4, 6]), 3) for rank in range(world)]
    assert [len(step) for step in ranks[0]] == [2 // world, 4 // world, 6 // world]
    rows = [row for step in zip(*ranks, strict=True) for micro in zip(*step, strict=True) for row in rows_of([*micro])]
    assert rows == [tuple(data.row(sample).tokens[:-1].tolist()) for sample in range(12)]


class _Broken:
    """Fails at one sample."""

    def __init__(self, data: TrainingData, broken: int) -> None:
        self.data, self.broken = data, broken

    def row(self, sample_index: int) -> PackedRow:
        if sample_index == self.broken:
            raise DataError("token 5 is bad")
        return self.data.row(sample_index)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_error_surfaces_at_its_step(data: TrainingData, prefetch: int) -> None:
    with loader(_Broken(data, 17), prefetch=prefetch) as steps:  # type: ignore[arg-type]
        assert len(next(steps)) == 4
        assert len(next(steps)) == 4
        with pytest.raises(DataError, match="token 5 is bad"):
            next(steps)
        with pytest.raises(StopIteration):
            next(steps)
    assert prefetch_threads() == []


def test_closing_stops_the_thread(data: TrainingData) -> None:
    steps = loader(data)
    next(steps)
    assert len(prefetch_threads()) == 1
    steps.close()
    steps.close()
    assert prefetch_threads() == []
    with pytest.raises(StopIteration):
        next(steps)


def test_forgotten_loader_stops_its_thread(data: TrainingData) -> None:
    steps = loader(data)
    next(steps)
    (thread,) = prefetch_threads()
    del steps
    gc.collect()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_prefetch_is_bounded(data: TrainingData) -> None:
    class Counting(_Broken):
        highest = -1

        def row(self, sample_index: int) -> PackedRow:
            self.highest = max(self.highest, sample_index)
            return super().row(sample_index)

    counting = Counting(data, -1)
    with loader(counting, prefetch=2) as steps:  # type: ignore[arg-type]
        next(steps)
        deadline = time.monotonic() + 20
        while counting.highest < 31 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert counting.highest == 31  # one taken, two queued, one in the thread's hand
        assert steps.last_wait_s >= 0


def test_too_short_source_is_refused_at_the_start(tmp_path: Path) -> None:
    counting_store(tmp_path / "short", [16])
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "short")}], validation_fraction=0.0)
    with pytest.raises(DataError, match=f"^{tmp_path}/short: 16 tokens, a row needs 17"):
        TrainingData(prepare_stores(config), config)


def test_errors_of_a_cached_store_begin_with_the_source_as_the_user_wrote_it(tmp_path: Path) -> None:
    """The rest of the line names file and position in the cache."""
    (tmp_path / "a.txt").write_text("hello " * 40)
    config = make_config(tmp_path / "cache", [{"source": str(tmp_path / "a.txt")}], validation_fraction=0.0)
    data = TrainingData(replace(prepare_stores(config), vocab_size=1), config)
    with pytest.raises(
        DataError, match=f"^{tmp_path}/a.txt: {tmp_path}/cache/.*: token .*: expected an id from 0 to 0"
    ):
        data.row(0)
