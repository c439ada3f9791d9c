"""Triton SwiGLU against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gates import swiglu_reference
from qwen3next_train.kernels.triton.swiglu import swiglu_triton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE


def check(gate_up: torch.Tensor, *weights_R: torch.Tensor) -> None:
    found = errors(swiglu_triton, swiglu_reference, [gate_up, *weights_R])
    assert max(found) < BOUNDS[gate_up.dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(5, 32), (1, 1), (70, 24), (3, 1100)])
def test_output_and_gradient(dtype: torch.dtype, rows: int, features: int) -> None:
    torch.manual_seed(0)
    gate_up = 3 * torch.randn(rows, 2 * features, device=DEVICE, dtype=dtype)
    check(gate_up)
    check(gate_up, torch.rand(rows, device=DEVICE))


def test_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    check(torch.randn(9, 80, device=DEVICE)[:, 8:72])
    check(torch.randn(9, 2, 64, device=DEVICE)[:, 1], torch.rand(9, 3, device=DEVICE)[:, 2])


def test_weights_multiply_the_rows_and_are_not_rounded_to_their_dtype() -> None:
    gate_up = torch.tensor([[0.0, 3.0], [1e4, 3.0]], dtype=torch.bfloat16, device=DEVICE)
    for swiglu in (swiglu_reference, swiglu_triton):
        weights = torch.tensor([1.0, 1 / 3], device=DEVICE, requires_grad=True)
        out = swiglu(gate_up, weights)
        assert out.dtype == torch.bfloat16
        assert out.flatten().tolist() == [0.0, 9984.0]
        out.sum().backward()
        assert weights.grad is not None
        assert weights.grad.dtype == torch.float32
        torch.testing.assert_close(weights.grad.cpu(), torch.tensor([0.0, 29952.0]), rtol=2**-8, atol=0)


def test_strong_gates_stay_finite() -> None:
    check(torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0]], device=DEVICE))


def test_no_rows() -> None:
    gate_up = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    weights = torch.empty(0, device=DEVICE, requires_grad=True)
    swiglu_triton(gate_up, weights).sum().backward()
    assert gate_up.grad is not None
    assert weights.grad is not None
    assert (gate_up.grad.shape, weights.grad.shape) == ((0, 8), (0,))


@pytest.mark.gpu
def test_at_the_model_s_size() -> None:
    torch.manual_seed(0)
    check(torch.randn(10010, 1024, device=DEVICE, dtype=torch.bfloat16), torch.rand(10010, device=DEVICE))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**21 + 5
    gate_up = torch.zeros(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    gate_up[-1] = 1
    out = swiglu_triton(gate_up)
    assert torch.equal(out[-1], swiglu_reference(gate_up[-1:].float())[0].bfloat16())
    assert not out[:-1].any()
