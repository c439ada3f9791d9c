"""Order, copies, weights and sums of routed tokens, with pairs that have no expert here."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.routing import TokenPermutation

REFERENCE = TokenPermutation()
FULL = torch.tensor([[2, 0], [0, 3], [2, 3]])
PARTIAL = torch.tensor([[2, -1], [-1, -1], [0, 2], [3, -1]])


def test_sort_is_stable_and_invertible() -> None:
    order = REFERENCE.sort(FULL, 5, 6)
    assert order.token_R.tolist() == [0, 1, 0, 2, 1, 2]
    assert order.row_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert order.counts_E.tolist() == [2, 0, 2, 2, 0]


def test_pairs_without_an_expert_get_no_row() -> None:
    order = REFERENCE.sort(PARTIAL, 4, 4)
    assert order.token_R.tolist() == [2, 0, 2, 3]
    assert order.row_TK.tolist() == [[1, -1], [-1, -1], [0, 2], [3, -1]]
    assert order.counts_E.tolist() == [1, 0, 2, 1]


def test_room_for_more_rows_than_there_are() -> None:
    exact, order = REFERENCE.sort(PARTIAL, 4, 4), REFERENCE.sort(PARTIAL, 4, 11)
    assert order.token_R.shape == (11,)
    assert order.token_R[:4].tolist() == exact.token_R.tolist()
    assert torch.equal(order.row_TK, exact.row_TK)
    assert torch.equal(order.counts_E, exact.counts_E)
    x = torch.randn(4, 3)
    rows = REFERENCE.permute(x, order)
    rows[4:] = torch.nan
    assert torch.equal(REFERENCE.unpermute(rows, order), REFERENCE.unpermute(rows[:4], exact))


def test_pairs_without_room_get_no_row() -> None:
    order = REFERENCE.sort(PARTIAL, 4, 2)
    assert order.token_R.tolist() == [2, 0]
    assert order.row_TK.tolist() == [[1, -1], [-1, -1], [0, -1], [-1, -1]]
    assert order.counts_E.tolist() == [1, 0, 2, 1], "of all pairs"


@pytest.mark.parametrize(("ids", "routed"), [(FULL, 6), (PARTIAL, 4), (torch.full((3, 2), -1), 0)])
def test_permute_and_unpermute_against_a_loop_and_numeric_gradients(ids: torch.Tensor, routed: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), 4, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator).requires_grad_()
    order = REFERENCE.sort(ids, 5, routed)

    def through(x_TD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        scale_R = torch.arange(5).repeat_interleave(order.counts_E) + 1
        scale_R = scale_R * REFERENCE.permute_weights(weights_TK, order)
        return REFERENCE.unpermute(REFERENCE.permute(x_TD, order) * scale_R.unsqueeze(1), order)

    expected = ((ids + 1) * weights).sum(1, keepdim=True) * x
    torch.testing.assert_close(through(x, weights), expected)
    assert torch.autograd.gradcheck(through, (x, weights))


def test_sums_of_bf16_rows_are_rounded_once() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    order = REFERENCE.sort(torch.tensor([[0, 1, 2]]), 3, 3)
    assert REFERENCE.unpermute(rows, order).item() == 258.0
