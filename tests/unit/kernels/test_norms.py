"""The gated norm in plain torch against its definition; tests/unit/model has the other norms."""

from __future__ import annotations

import torch

from qwen3next_train.kernels.norms import gated_rms_norm_reference
from tests.unit.kernels.packing import relative_error


def definition(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the contract says, in the dtype given."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * gate * torch.sigmoid(gate)


def test_gated_norm_equals_its_definition() -> None:
    torch.manual_seed(0)
    x, gate, weight = (torch.randn(5, 3, 8, dtype=torch.float64) for _ in range(3))
    weight = weight[0, 0]
    value = gated_rms_norm_reference(x, gate, weight, eps=1e-3)
    torch.testing.assert_close(value, definition(x, gate, weight, 1e-3), rtol=1e-12, atol=1e-14)


def test_gated_norm_in_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, gate, weight = torch.randn(200, 16).bfloat16(), torch.randn(200, 16).bfloat16(), torch.randn(16).bfloat16()
    value = gated_rms_norm_reference(x, gate, weight, eps=1e-6)
    exact = definition(x.double(), gate.double(), weight.double(), 1e-6)
    assert value.dtype == torch.bfloat16
    assert float(((value.double() - exact) / exact).abs().max()) <= 2**-8


def test_gated_norm_of_zero_input_gives_zero_and_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    gated_rms_norm_reference(x, torch.ones(2, 4), torch.ones(4), eps=1e-6).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert relative_error(gated_rms_norm_reference(x, torch.ones(2, 4), torch.ones(4), eps=1e-6), x * 0) == 0
