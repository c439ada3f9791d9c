"""Triton SwiGLU against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gates import swiglu_reference
from qwen3next_train.kernels.triton.swiglu import swiglu_triton
from qwen3next_train.selftest.moe_cases import swiglu
from tests.unit.kernels.comparison import check, random
from tests.unit.kernels.interpreted import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features"), [(5, 32), (1, 1), (70, 24), (3, 1100)])
@pytest.mark.parametrize("weighted", [False, True])
def test_output_and_gradient(dtype: torch.dtype, rows: int, features: int, weighted: bool) -> None:
    check(swiglu(random(), rows, features, weighted=weighted), dtype)


def test_rows_that_lie_apart() -> None:
    draw = random()
    check(swiglu(draw, 9, 32, weighted=False), torch.float32, gate_up=draw.normal(9, 80)[:, 8:72])
    views = {"gate_up": draw.normal(9, 2, 64)[:, 1], "weights_R": draw.uniform(9, 3)[:, 2]}
    check(swiglu(draw, 9, 32, weighted=True), torch.float32, **views)


def test_weights_multiply_the_rows_and_are_not_rounded_to_their_dtype() -> None:
    gate_up = torch.tensor([[0.0, 3.0], [1e4, 3.0]], dtype=torch.bfloat16, device=DEVICE)
    for backend in (swiglu_reference, swiglu_triton):
        weights = torch.tensor([1.0, 1 / 3], device=DEVICE, requires_grad=True)
        out = backend(gate_up, weights)
        assert out.dtype == torch.bfloat16
        assert out.flatten().tolist() == [0.0, 9984.0]
        out.sum().backward()
        assert weights.grad is not None
        assert weights.grad.dtype == torch.float32
        torch.testing.assert_close(weights.grad.cpu(), torch.tensor([0.0, 29952.0]), rtol=2**-8, atol=0)


def test_strong_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    check(swiglu(random(), 1, 4, weighted=False), torch.float32, gate_up=gate_up)


def test_no_rows() -> None:
    gate_up = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    weights = torch.empty(0, device=DEVICE, requires_grad=True)
    swiglu_triton(gate_up, weights).sum().backward()
    assert gate_up.grad is not None
    assert weights.grad is not None
    assert (gate_up.grad.shape, weights.grad.shape) == ((0, 8), (0,))


@pytest.mark.gpu
def test_at_the_model_s_size() -> None:
    check(swiglu(random(), 10010, 512, weighted=True), torch.bfloat16)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**21 + 5
    gate_up = torch.zeros(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    gate_up[-1] = 1
    out = swiglu_triton(gate_up)
    assert torch.equal(out[-1], swiglu_reference(gate_up[-1:].float())[0].bfloat16())
    assert not out[:-1].any()
