import numpy as np
import torch

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch, PackedRow
from qwen3next_train.row_slices import RowSlice


def _row(tokens: list[int], boundaries: list[int], *, ends_inside_document: bool) -> PackedRow:
    return PackedRow(np.array(tokens), np.array(boundaries), ends_inside_document)


def test_two_rows_flatten_to_labels_positions_and_boundaries_worked_by_hand() -> None:
    rows = [
        _row([1, 2, 0, 5, 6, 7], [0, 3, 5], ends_inside_document=True),
        _row([8, 0, 9, 0, 3, 4], [0, 2, 4, 5], ends_inside_document=False),
    ]
    batch = PackedBatch.from_rows(rows, mtp_depths=2)
    ignored = IGNORE_INDEX
    assert batch.input_ids_T.tolist() == [1, 2, 0, 5, 6, 8, 0, 9, 0, 3]
    assert batch.labels_T.tolist() == [2, 0, ignored, 6, 7, 0, ignored, 0, ignored, ignored]
    assert batch.positions_U.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 0]
    assert batch.cu_seqlens_cpu.tolist() == [0, 3, 5, 7, 9, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    # Depth 0: 2 + 2 targets in row one, 1 + 1 + 0 in row two; each further depth loses one per piece.
    assert batch.num_targets == (6, 2, 0)
    assert batch.sum_squared_lengths == 9 + 4 + 4 + 4 + 1
    assert batch.num_tokens == 10


def test_counts_equal_the_labels_for_random_documents() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        length = int(generator.integers(2, 40))
        cuts = np.flatnonzero(generator.random(length - 1) < 0.3) + 1
        boundaries = np.concatenate([[0], cuts, [length]])
        row = PackedRow(generator.integers(0, 99, length + 1), boundaries, bool(generator.random() < 0.5))
        batch = PackedBatch.from_rows([row, row], mtp_depths=1)
        assert batch.num_targets[0] == int((batch.labels_T != IGNORE_INDEX).sum())
        # A depth-1 target exists where this position and the next one of the same document have labels.
        ends = set((batch.cu_seqlens_cpu[1:] - 1).tolist())
        second = [
            position
            for position in range(batch.num_tokens)
            if position not in ends and batch.labels_T[position + 1] != IGNORE_INDEX
        ]
        assert batch.num_targets[1] == len(second)


def test_shares_of_slices_have_their_tokens_once_and_the_mixers_positions_of_the_slice() -> None:
    rows = [
        _row([1, 2, 0, 5, 6, 7, 8, 9, 3], [0, 3, 8], ends_inside_document=True),
        _row([8, 0, 9, 0, 3, 4, 5, 6, 7], [0, 2, 4, 8], ends_inside_document=False),
    ]
    whole = PackedBatch.from_rows(rows, mtp_depths=1)
    parts = {
        (index, share): whole.cut(RowSlice(index, 2, halo=3, share=share, num_shares=2))
        for index in range(2)
        for share in range(2)
    }
    assert parts[1, 0].input_ids_T.tolist() == [6, 7, 3, 4]
    assert parts[1, 1].input_ids_T.tolist() == [8, 9, 5, 6]
    # Both shares of the second slice see all of it, and its documents.
    for share in range(2):
        assert parts[1, share].positions_U.tolist() == [1, 2, 3, 4, 0, 1, 2, 3]
        assert parts[1, share].positions_T.tolist() == [[1, 2, 0, 1], [3, 4, 2, 3]][share]
        assert parts[1, share].cu_seqlens_cpu.tolist() == [0, 4, 8]
        assert parts[1, share].slices is not None
    for depth in range(2):
        assert sum(part.num_targets[depth] for part in parts.values()) == whole.num_targets[depth]
    assert sum(part.sum_squared_lengths for part in parts.values()) == whole.sum_squared_lengths
    alone = whole.cut(RowSlice(0, 1, halo=3, share=1, num_shares=2))
    assert alone.input_ids_T.tolist() == [6, 7, 8, 9, 3, 4, 5, 6]
    assert alone.positions_U.equal(whole.positions_U)
    assert alone.cu_seqlens_cpu.equal(whole.cu_seqlens_cpu)
    assert alone.slices is None
