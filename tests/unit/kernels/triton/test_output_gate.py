"""Triton output gate against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.triton.output_gate import output_gate_triton
from qwen3next_train.selftest.mixer_cases import output_gate
from tests.unit.kernels.comparison import check, random
from tests.unit.kernels.interpreted import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 32), (1, 1, 1), (33, 2, 24)])
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(output_gate(random(), *shape), dtype)


def test_views_of_a_projection_and_of_a_batch() -> None:
    draw = random()
    gate = draw.normal(6, 4, 64)[..., 32:]
    check(output_gate(draw, 6, 4, 32), torch.float32, gate_TNH=gate)
    check(output_gate(draw, 6, 4, 32), torch.float32, x_TNH=draw.normal(4, 6, 32).transpose(0, 1), gate_TNH=gate)


def test_strong_gates_stay_finite() -> None:
    gate = torch.tensor([[[-1e4, -20.0, 0.0, 20.0, 1e4]]], device=DEVICE)
    check(output_gate(random(), 1, 1, 5), torch.float32, x_TNH=torch.ones(1, 1, 5, device=DEVICE), gate_TNH=gate)


def test_no_tokens() -> None:
    x = torch.empty(0, 2, 8, device=DEVICE, requires_grad=True)
    output_gate_triton(x, x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 2, 8)


@pytest.mark.gpu
def test_at_the_model_s_size() -> None:
    draw = random()
    check(output_gate(draw, 1001, 16, 256), torch.bfloat16, gate_TNH=draw.normal(1001, 16, 512)[..., 256:])
