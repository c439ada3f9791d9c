"""The plan of cuts: the docstring's example, and any documents against what each token may see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.row_slices import RowSlice, SlicePlan, plan_slices, squares_of_slice
from qwen3next_train.topology import Topology


@st.composite
def cut_rows(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Documents' starts, number of rows, of slices, and a halo that fits."""
    num_rows, num_slices, size = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 7))
    length = num_slices * size
    starts = {row * length for row in range(num_rows)}
    starts |= draw(st.sets(st.integers(0, num_rows * length - 1)))
    return np.array([*sorted(starts), num_rows * length]), num_rows, num_slices, draw(st.integers(1, size))


def plans(cu_seqlens: np.ndarray, num_rows: int, num_slices: int, halo: int) -> list[SlicePlan]:
    return [
        plan_slices(cu_seqlens, num_rows=num_rows, part=RowSlice(index, num_slices, halo))
        for index in range(num_slices)
    ]


def documents_of(cumulated: np.ndarray) -> list[int]:
    """Of every position the document it belongs to."""
    return [document for document, (a, b) in enumerate(pairwise(cumulated.tolist())) for _ in range(a, b)]


def test_the_docstrings_example() -> None:
    first, second = plans(np.array([0, 6, 8]), 1, 2, 3)
    assert second.pieces.tolist() == [0, 2, 4]
    assert second.convolved.tolist() == [0, 5, 7]
    assert second.scanned.tolist() == [0, 3, 5, 7]
    assert (second.first, second.last) == ((1,), ((5, 7),))
    assert second.whole.tolist() == [0, 6, 8]
    # Nothing is before the first slice, so its halo belongs to no document.
    assert first.convolved.tolist() == first.scanned.tolist() == [0, 3, 7]
    assert first.continues == second.continues == ((False,), (True,))
    assert first.passes == second.passes == ((True,), (False,))


def test_a_document_that_begins_at_a_cut_takes_no_state_and_sees_no_halo() -> None:
    _, second = plans(np.array([0, 4, 8]), 1, 2, 3)
    assert second.continues[1] == (False,)
    assert second.passes[1] == (True,)
    assert second.convolved.tolist() == [0, 3, 7]


def test_documents_shorter_than_a_slice_and_two_rows() -> None:
    _, second = plans(np.array([0, 5, 6, 8, 12, 15, 16]), 2, 2, 1)
    assert second.pieces.tolist() == [0, 1, 2, 4, 7, 8]
    assert second.convolved.tolist() == [0, 2, 3, 5, 6, 9, 10]
    assert second.scanned.tolist() == [0, 1, 2, 3, 5, 6, 9, 10]
    assert (second.first, second.last) == ((1, 5), ((3, 5), (9, 10)))
    assert second.continues == ((False, False), (True, False))
    assert second.passes == ((True, True), (False, False))


@settings(deadline=None)
@given(cut_rows())
def test_slices_are_the_row_and_every_position_sees_what_it_would_in_the_row(rows: tuple) -> None:
    cu_seqlens, num_rows, num_slices, halo = rows
    whole = documents_of(cu_seqlens)
    size = len(whole) // num_rows // num_slices
    for index, plan in enumerate(plans(*rows)):
        assert plan.convolved[-1] == num_rows * (size + halo)
        pieces, convolved = documents_of(plan.pieces), documents_of(plan.convolved)
        scanned = documents_of(plan.scanned)
        for row in range(num_rows):
            begin = (row * num_slices + index) * size
            own, extended = row * size, row * (size + halo)
            for i in range(size):
                for j in range(size):
                    same = whole[begin + i] == whole[begin + j]
                    assert (pieces[own + i] == pieces[own + j]) == same
                    assert (scanned[extended + halo + i] == scanned[extended + halo + j]) == same
                for back in range(1, halo + 1):
                    # A halo before the row's first token belongs to nothing that is read.
                    before = begin + i - back
                    seen = before >= row * num_slices * size and whole[before] == whole[begin + i]
                    assert (convolved[extended + halo + i - back] == convolved[extended + halo + i]) == seen
            assert scanned[extended + halo - 1] != scanned[extended + halo]
            assert plan.first[row] == scanned[extended + halo]
            start, stop = plan.last[row]
            assert (stop, scanned[start]) == (extended + size + halo, scanned[extended + size + halo - 1])
            assert scanned[start - 1] != scanned[start]
            assert plan.continues[index][row] == (index > 0 and whole[begin - 1] == whole[begin])
            assert plan.passes[index][row] == (whole[begin] == whole[begin + size - 1])


@settings(deadline=None)
@given(cut_rows())
def test_shares_of_the_squared_lengths_add_up_to_them(rows: tuple) -> None:
    cu_seqlens, num_rows, num_slices, halo = rows
    shares = [
        squares_of_slice(cu_seqlens, num_rows=num_rows, part=RowSlice(index, num_slices, halo))
        for index in range(num_slices)
    ]
    assert sum(shares) == int((np.diff(cu_seqlens) ** 2).sum())


def test_the_later_slice_of_one_document_has_the_larger_share() -> None:
    shares = [squares_of_slice(np.array([0, 8]), num_rows=1, part=RowSlice(index, 2, 1)) for index in range(2)]
    assert shares == [16, 48]


@pytest.mark.parametrize(
    ("starts", "squares"),
    [([0, 2**18], 4**18 * (64 - 49) // 64), (range(2**18 + 1), 2**15), ([0, 7 * 2**15 - 1, 2**18], 2**30 + 2**16)],
    ids=["one document", "single tokens", "from before the cut"],
)
def test_squares_of_the_last_slice_of_a_long_row(starts: Sequence[int], squares: int) -> None:
    """Of 262,144 tokens over eight ranks; what a batch has is of 32 bits, which the squares are not."""
    cu_seqlens = np.array(starts, dtype=np.int32)
    assert squares_of_slice(cu_seqlens, num_rows=1, part=RowSlice(7, 8, 3)) == squares


def test_part_of_a_rank_has_the_halo_of_the_models_convolution() -> None:
    topology = Topology(8, 6, context_parallel_size=4)
    assert RowSlice.of(topology, ModelConfig(linear_conv_kernel_dim=5)) == RowSlice(2, 4, halo=4)


@pytest.mark.parametrize(("length", "halo"), [(9, 1), (8, 5)])
def test_rows_that_cannot_be_cut_are_our_mistake(length: int, halo: int) -> None:
    with pytest.raises(AssertionError):
        plan_slices(np.array([0, length]), num_rows=1, part=RowSlice(0, 2, halo))
