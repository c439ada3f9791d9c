"""Where each source goes on when the data changes: rows by hand, nothing repeated, nothing passed over unsaid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from qwen3next_train.data.loader import TrainingData
from qwen3next_train.data.position import DataStart, change_start, is_same_stream, new_start
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.prepared import PreparedData
from tests.unit.data.corpus import make_config, write_store

ROWS = 20
"""Rows of 16 tokens in an epoch of each store."""


class Mix:
    """A blend that is opened, and where it begins."""

    def __init__(self, tmp_path: Path, *sources: tuple[str, float], seed: int = 1234, **data: Any) -> None:
        for name, _ in sources:
            if not (tmp_path / f"{name}.idx").exists():
                first = 1000 * "abc".index(name)
                write_store(tmp_path / name, [list(range(first, first + 16 * (ROWS + 1)))])
        named = [{"source": str(tmp_path / name), "weight": weight} for name, weight in sources]
        config = make_config(tmp_path / "cache", named, validation_fraction=0.0, **data)
        self.config: Config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        self.prepared: PreparedData = prepare_stores(self.config)
        self.weights = [weight for _, weight in sources]
        self.start = new_start(self.prepared, sequence_length=self.config.data.sequence_length, seed=seed)

    def after(self, earlier: Mix, consumed: int) -> Mix:
        """The same blend, going on where another one was after ``consumed`` samples."""
        self.start = change_start(earlier.start, earlier.weights, consumed, self.prepared, self.config)
        return self

    def rows(self, count: int) -> list[int]:
        """The last token of each of the first rows, which tells the row."""
        data = TrainingData(self.prepared, self.config, self.start)
        return [int(data.row(sample).tokens[-1]) for sample in range(count)]

    def first_rows(self) -> list[tuple[int, int]]:
        return [(source.order, source.first_row) for source in self.start.sources]


def test_a_run_whose_data_never_changed_begins_at_its_first_rows(tmp_path: Path) -> None:
    mix = Mix(tmp_path, ("a", 1.0), ("b", 1.0))
    assert mix.first_rows() == [(0, 0), (1, 0)]
    data = TrainingData(mix.prepared, mix.config)
    assert mix.rows(9) == [int(data.row(sample).tokens[-1]) for sample in range(9)]


def test_a_source_that_stays_goes_on_at_its_next_row_and_a_new_one_begins(tmp_path: Path) -> None:
    before = Mix(tmp_path, ("a", 1.0))
    after = Mix(tmp_path, ("b", 1.0), ("a", 3.0)).after(before, 5)
    assert after.first_rows() == [(1, 0), (0, 5)]
    assert after.start.lines == (
        f"{tmp_path}/b: begins at row 0 of 20",
        f"{tmp_path}/a: goes on at row 5 of 20 of epoch 0",
    )
    # The rows of a alone, old and new, are one whole epoch and no row twice.
    alone = Mix(tmp_path, ("a", 1.0)).after(before, 5)
    assert before.rows(5) + alone.rows(15) == before.rows(20)
    assert len(set(before.rows(20))) == 20


def test_other_weights_neither_repeat_nor_skip_a_row(tmp_path: Path) -> None:
    before = Mix(tmp_path, ("a", 3.0), ("b", 1.0))
    taken = 12
    data = TrainingData(before.prepared, before.config)
    of_a = sum(data._blend.locate(sample)[0] == 0 for sample in range(taken))
    after = Mix(tmp_path, ("a", 1.0), ("b", 3.0)).after(before, taken)
    assert after.first_rows() == [(0, of_a), (1, taken - of_a)]
    assert 0 < of_a < taken


def test_a_dropped_source_is_remembered_and_comes_back_where_it_was(tmp_path: Path) -> None:
    first = Mix(tmp_path, ("a", 1.0))
    second = Mix(tmp_path, ("b", 1.0)).after(first, 7)
    assert [source.first_row for source in second.start.former] == [7]
    third = Mix(tmp_path, ("b", 1.0), ("a", 1.0), ("c", 1.0)).after(second, 4)
    assert third.first_rows() == [(1, 4), (0, 7), (2, 0)]
    assert third.start.former == ()


def test_the_same_source_twice_keeps_two_positions(tmp_path: Path) -> None:
    before = Mix(tmp_path, ("a", 1.0), ("a", 1.0))
    after = Mix(tmp_path, ("a", 1.0)).after(before, 4096)
    assert after.first_rows() == [(0, 2048)]
    assert [(source.order, source.first_row) for source in after.start.former] == [(1, 2048)]


@pytest.mark.parametrize(
    ("consumed", "first_row", "left"),
    # 20 rows of 16 tokens an epoch, 9 of 32: (336 - 32) // 32.
    [(0, 0, ""), (20, 9, ""), (40, 18, ""), (7, 9, "13 of 20 rows of epoch 0"), (33, 18, "7 of 20 rows of epoch 1")],
)
def test_rows_of_another_length_begin_at_the_next_epoch(
    tmp_path: Path, consumed: int, first_row: int, left: str
) -> None:
    before = Mix(tmp_path, ("a", 1.0))
    after = Mix(tmp_path, ("a", 1.0), sequence_length=32).after(before, consumed)
    assert after.first_rows() == [(0, first_row)]
    end = f"; {left} are left out" if left else ""
    assert after.start.lines == (f"{tmp_path}/a: goes on at row 0 of 9 of epoch {first_row // 9}{end}",)


def test_another_seed_begins_at_the_next_epoch_too(tmp_path: Path) -> None:
    after = Mix(tmp_path, ("a", 1.0), seed=5).after(Mix(tmp_path, ("a", 1.0)), 3)
    assert after.first_rows() == [(0, 20)]
    assert after.start.sources[0].seed == 5


def test_of_a_checkpoint_that_does_not_say_its_sources_all_count_as_new_in_another_order(tmp_path: Path) -> None:
    mix = Mix(tmp_path, ("a", 1.0))
    start = change_start(DataStart(()), [1.0, 2.0], 50, mix.prepared, mix.config)
    assert [(source.order, source.first_row) for source in start.sources] == [(2, 0)]


def test_what_is_the_same_stream(tmp_path: Path) -> None:
    mix = Mix(tmp_path, ("a", 1.0), ("b", 2.0))

    def same(other: Mix, weights: list[float] | None = None) -> bool:
        return is_same_stream(mix.start.sources, weights or mix.weights, other.prepared, other.config)

    assert same(mix)
    assert same(Mix(tmp_path, ("a", 2.0), ("b", 4.0)))
    assert not same(Mix(tmp_path, ("b", 2.0), ("a", 1.0)))
    assert not same(Mix(tmp_path, ("a", 1.0), ("b", 3.0)))
    assert not same(Mix(tmp_path, ("a", 1.0), ("b", 2.0), sequence_length=32))
    assert not same(Mix(tmp_path, ("a", 1.0), ("b", 2.0), seed=1))
    assert not same(Mix(tmp_path, ("a", 1.0)))
    moved = [replace(source, first_row=9) for source in mix.start.sources]
    assert is_same_stream(moved, mix.weights, mix.prepared, mix.config)
