"""The loop over experts against each row by itself, above all with experts that get nothing."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.grouped_gemm import grouped_matmul_reference


@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 5, 0], [0, 0, 7], [0, 0, 0]])
def test_rows_meet_their_experts_weight(counts: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    out = grouped_matmul_reference(x, weight, counts_e=torch.tensor(counts))
    owner = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert out.shape == (sum(counts), 5)
    for row, expert in enumerate(owner):
        torch.testing.assert_close(out[row], weight[expert] @ x[row])
    out.square().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    for expert, count in enumerate(counts):
        rows = [row for row, who in enumerate(owner) if who == expert]
        expected = 2 * out.detach()[rows].T @ x.detach()[rows]
        torch.testing.assert_close(weight.grad[expert], expected)
        assert count > 0 or not weight.grad[expert].any()


@pytest.mark.parametrize("counts", [[3, 2, 4], [0, 0, 0], [2, 0, 0]])
def test_room_behind_the_last_row_is_neither_read_nor_summed(counts: list[int]) -> None:
    """Not in the product, nor in the gradients, which NaN from there would spoil."""
    torch.manual_seed(0)
    total, room = sum(counts), sum(counts) + 3
    x = torch.randn(room, 4, requires_grad=True)
    with torch.no_grad():
        x[total:] = torch.nan
    weight = torch.randn(3, 5, 4, requires_grad=True)
    upstream = torch.randn(room, 5)
    upstream[total:] = torch.nan
    counts_e = torch.tensor(counts)
    out = grouped_matmul_reference(x, weight, counts_e=counts_e)
    assert out[total:].isnan().all()
    exact = grouped_matmul_reference(x[:total], weight, counts_e=counts_e)
    assert torch.equal(out[:total], exact)
    found = torch.autograd.grad(out, (x, weight), upstream)
    expected = torch.autograd.grad(exact, (x, weight), upstream[:total])
    assert torch.equal(found[0][:total], expected[0][:total])
    assert torch.equal(found[1], expected[1])
