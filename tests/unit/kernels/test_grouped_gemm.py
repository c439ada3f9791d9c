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
