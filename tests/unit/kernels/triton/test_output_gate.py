"""Triton output gate against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gates import output_gate_reference
from qwen3next_train.kernels.triton.output_gate import output_gate_triton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE


def check(x: torch.Tensor, gate: torch.Tensor) -> None:
    found = errors(output_gate_triton, output_gate_reference, [x, gate])
    assert max(found) < BOUNDS[x.dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 32), (1, 1, 1), (33, 2, 24)])
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x, gate = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2))
    check(x, 4 * gate)


def test_views_of_a_projection_and_of_a_batch() -> None:
    torch.manual_seed(0)
    gate = torch.randn(6, 4, 64, device=DEVICE)[..., 32:]
    check(torch.randn(6, 4, 32, device=DEVICE), gate)
    check(torch.randn(4, 6, 32, device=DEVICE).transpose(0, 1), gate)


def test_strong_gates_stay_finite() -> None:
    x = torch.ones(1, 1, 5, device=DEVICE)
    gate = torch.tensor([[[-1e4, -20.0, 0.0, 20.0, 1e4]]], device=DEVICE)
    check(x, gate)


def test_no_tokens() -> None:
    x = torch.empty(0, 2, 8, device=DEVICE, requires_grad=True)
    output_gate_triton(x, x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 2, 8)


@pytest.mark.gpu
def test_at_the_model_s_size() -> None:
    torch.manual_seed(0)
    gate = torch.randn(1001, 16, 512, device=DEVICE, dtype=torch.bfloat16)[..., 256:]
    check(torch.randn(1001, 16, 256, device=DEVICE, dtype=torch.bfloat16), gate)
