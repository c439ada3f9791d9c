"""Triton gated addition against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.triton.shared_expert_combine import shared_expert_combine_triton
from qwen3next_train.selftest.moe_cases import shared_expert_combine
from tests.unit.kernels.comparison import check, random
from tests.unit.kernels.interpreted import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32), (1, 1), (33, 24), (4, 1100)])
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(shared_expert_combine(random(), *shape), dtype)


def test_bf16_is_rounded_once() -> None:
    """1 + (256 + 2 / 2); the sum in brackets by itself is 256 in bf16."""
    rows = [torch.full((1, 4), value, device=DEVICE, dtype=torch.bfloat16) for value in (1.0, 256.0, 2.0, 0.0)]
    out = shared_expert_combine_triton(*rows, torch.ones(1, 4, device=DEVICE, dtype=torch.bfloat16))
    assert out.tolist() == [[258.0] * 4]


def test_residual_and_base_are_not_kept_and_get_the_gradient_as_it_is() -> None:
    rows = [torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(4)]
    upstream = torch.randn(3, 8, device=DEVICE)
    before = upstream.clone()
    weight = torch.ones(1, 8, device=DEVICE)
    out = shared_expert_combine_triton(*rows, weight)
    saved = out.grad_fn.saved_tensors
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in (*rows[2:], weight)]
    for gradient in torch.autograd.grad(out, rows[:2], upstream):
        assert gradient.data_ptr() == upstream.data_ptr()
    assert torch.equal(upstream, before)


def test_views() -> None:
    draw, places = random(), {"residual_TD": 0, "base_TD": 2, "branch_TD": 1, "x_TD": 3}
    views = {name: draw.normal(7, 4, 16)[:, index] for name, index in places.items()}
    check(shared_expert_combine(draw, 7, 16), torch.float32, **views)


def test_no_rows() -> None:
    rows = [torch.empty(0, 8, device=DEVICE, requires_grad=True) for _ in range(4)]
    weight = torch.ones(1, 8, device=DEVICE, requires_grad=True)
    shared_expert_combine_triton(*rows, weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_closed_and_open_gates(logit: float) -> None:
    rows = [torch.full((2, 4), value, device=DEVICE) for value in (4.0, 1.0, 2.0, logit)]
    out = shared_expert_combine_triton(*rows, torch.ones(1, 4, device=DEVICE))
    assert torch.equal(out, torch.full_like(out, 5.0 if logit < 0 else 7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1001, 16384])
def test_at_the_model_s_size(tokens: int) -> None:
    check(shared_expert_combine(random(), tokens, 2048), torch.bfloat16)
