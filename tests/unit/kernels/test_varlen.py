"""Layouts derived from document boundaries."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.varlen import gather_rows, scatter_rows
from tests.unit.kernels.packing import documents


def test_chunks_put_step_i_of_all_documents_together_longest_first() -> None:
    layout = documents(3, 9, 5).chunks(4)
    assert layout.chunks_per_step == (3, 2, 1)
    assert layout.document_order.tolist() == [1, 2, 0]
    # Chunks in order: doc 1, 2, 0 (step 0), doc 1, 2 (step 1), doc 1 (step 2).
    assert layout.slots_T.tolist() == [9, 10, 11, 0, 1, 2, 3, 12, 13, 14, 15, 23, 4, 5, 6, 7, 19]


def test_bins_keep_documents_whole_and_hide_them_from_each_other() -> None:
    layout = documents(2, 1, 4, 3).bins()
    assert (layout.length, layout.num_bins) == (4, 3)
    assert layout.slots_T.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert layout.visible_BLL is not None
    assert layout.visible_BLL[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_equal_documents_need_no_mask() -> None:
    assert documents(4, 4).bins().visible_BLL is None


def test_common_length_is_that_of_all_documents() -> None:
    assert documents(4, 4).common_length == 4
    assert documents(7).common_length == 7
    assert documents(4, 3, 4).common_length is None
    assert documents(1, 4, 7).common_length is None


def test_spaced_slots_leave_a_gap_before_every_document() -> None:
    assert documents(2, 1, 3).spaced_slots(2).tolist() == [2, 3, 6, 9, 10, 11]


def test_starts_and_chunk_indices_in_order_of_the_tokens() -> None:
    sequences = documents(3, 1, 4)
    assert sequences.starts().tolist() == [0, 0, 0, 3, 4, 4, 4, 4]
    assert sequences.chunk_indices(2).tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]]
    assert {sequences.starts().dtype, sequences.chunk_indices(2).dtype} == {torch.int32}


def test_layouts_are_computed_once() -> None:
    sequences = documents(5, 6)
    assert sequences.chunks(4) is sequences.chunks(4)
    assert sequences.chunks(2) is not sequences.chunks(4)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 2)])
def test_scatter_and_gather_are_each_others_gradient(trailing: tuple[int, ...]) -> None:
    slots = torch.tensor([4, 0, 2])
    rows = torch.randn(3, *trailing, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(6, *trailing, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gather_rows(scatter_rows(rows, slots, 6), slots), rows)
    assert torch.autograd.gradcheck(lambda x: scatter_rows(x, slots, 6), rows)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, slots), padded)


def test_extended_documents_have_the_gap_before_them() -> None:
    sequences = documents(2, 1, 3)
    extended = sequences.extended(2)
    assert extended.cu_seqlens_cpu.tolist() == extended.cu_seqlens.tolist() == [0, 4, 7, 12]
    assert extended.cu_seqlens.dtype == torch.int32
    assert sequences.extended(2) is extended
