from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data.rows import RowSampler, read_row
from qwen3next_train.data.token_store import DocumentRange, TokenStore
from qwen3next_train.errors import DataError
from tests.unit.data.corpus import counting_store, everything, write_megatron, write_store


def sampler(documents: DocumentRange, length: int, *, seed: int = 0, vocab_size: int = 1 << 20) -> RowSampler:
    return RowSampler(
        documents,
        sequence_length=length,
        vocab_size=vocab_size,
        isolate_documents=True,
        seed=seed,
        source_index=0,
    )


@pytest.mark.parametrize(
    ("num_tokens", "length"), [(100, 7), (64, 8), (65, 8), (1000, 16), (9, 8), (16, 8), (17, 8), (2, 1)]
)
def test_every_token_of_an_epoch_is_met_once(tmp_path: Path, num_tokens: int, length: int) -> None:
    rows = sampler(everything(counting_store(tmp_path / "store", [num_tokens])), length)
    offsets = set()
    for epoch in range(12):
        taken = [rows.row(epoch * rows.num_rows + index) for index in range(rows.num_rows)]
        inputs = sorted(token for row in taken for token in row.tokens[:-1].tolist())
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert num_tokens - len(inputs) < 2 * length
        assert all((np.diff(row.tokens) == 1).all() and len(row.tokens) == length + 1 for row in taken)
        offsets.add(inputs[0])
    assert len(offsets) > 1 or rows._num_offsets == 1


def test_epochs_are_shuffled_differently(tmp_path: Path) -> None:
    rows = sampler(everything(counting_store(tmp_path / "store", [4000])), 16)
    orders = [[rows.row_start(e * rows.num_rows + j) // 16 for j in range(rows.num_rows)] for e in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_rows_never_change(tmp_path: Path) -> None:
    rows = sampler(everything(counting_store(tmp_path / "store", [50, 30, 120, 1, 300])), 16, seed=1234)
    assert rows.num_rows == 30
    assert [rows.row_start(index) for index in [*range(6), 29, 30, 31, 10**9]] == [
        427,
        75,
        347,
        43,
        331,
        139,
        267,
        33,
        241,
        382,
    ]


def test_boundaries_agree_with_the_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 12, 100).tolist()
    documents = everything(counting_store(tmp_path / "store", lengths))
    owner = np.repeat(np.arange(100), lengths)
    for start in range(documents.num_tokens - 16):
        row = read_row(documents, start, sequence_length=16, vocab_size=1 << 20, isolate_documents=True)
        inside = owner[start : start + 16]
        expected = [0, *(np.flatnonzero(np.diff(inside)) + 1).tolist(), 16]
        assert row.boundaries.tolist() == expected
        assert row.ends_inside_document == (owner[start + 15] == owner[start + 16])
        assert row.tokens.tolist() == list(range(start, start + 17))


def test_without_isolation_a_row_is_one_document(tmp_path: Path) -> None:
    documents = everything(counting_store(tmp_path / "store", [3] * 20))
    row = read_row(documents, 5, sequence_length=16, vocab_size=1 << 20, isolate_documents=False)
    assert row.boundaries.tolist() == [0, 16]
    assert row.ends_inside_document


def test_boundaries_of_documents_with_several_or_no_sequences(tmp_path: Path) -> None:
    sequences = [[1, 2], [3], [], [4, 5, 6], [], [7, 8]]
    write_megatron(tmp_path / "store", sequences, [0, 2, 2, 3, 5, 6], code=8, dtype="<u2")
    documents = everything(TokenStore(tmp_path / "store"))
    row = read_row(documents, 0, sequence_length=7, vocab_size=10, isolate_documents=True)
    assert row.boundaries.tolist() == [0, 3, 6, 7]
    assert row.ends_inside_document
    row = read_row(documents, 0, sequence_length=6, vocab_size=10, isolate_documents=True)
    assert (row.boundaries.tolist(), row.ends_inside_document) == ([0, 3, 6], False)


def test_row_inside_one_long_document(tmp_path: Path) -> None:
    documents = everything(counting_store(tmp_path / "store", [10, 500_000, 10]))
    row = read_row(documents, 250_000, sequence_length=4096, vocab_size=1 << 20, isolate_documents=True)
    assert row.boundaries.tolist() == [0, 4096]
    assert row.ends_inside_document


@pytest.mark.parametrize("bad", [100, 2**31 - 1, -1, -(2**31)])
def test_bad_token_id_names_file_and_position(tmp_path: Path, bad: int) -> None:
    write_megatron(tmp_path / "store", [[1, 2, 3], [4, 5, bad, 7, 8]], [0, 1, 2], code=4, dtype="<i4")
    documents = DocumentRange(TokenStore(tmp_path / "store"), range(1, 2))
    with pytest.raises(DataError, match=rf"store\.bin: token 5: expected an id from 0 to 99, found {bad};"):
        read_row(documents, 1, sequence_length=3, vocab_size=100, isolate_documents=True)


def test_corpus_shorter_than_a_row(tmp_path: Path) -> None:
    documents = everything(counting_store(tmp_path / "store", [8, 8]))
    assert sampler(documents, 15).num_rows == 1
    with pytest.raises(DataError, match=r"^16 tokens, a row needs 17; add text or lower data\.sequence_length"):
        sampler(documents, 16)


def test_sources_and_seeds_are_shuffled_independently(tmp_path: Path) -> None:
    documents = everything(write_store(tmp_path / "store", [[1] * 4000]))
    orders = set()
    for seed in (0, 1):
        for source in (0, 1):
            rows = RowSampler(
                documents, sequence_length=8, vocab_size=9, isolate_documents=True, seed=seed, source_index=source
            )
            orders.add(tuple(rows.row_start(index) // 8 for index in range(50)))
    assert len(orders) == 4
