"""Triton gated addition against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gates import shared_expert_combine_reference
from qwen3next_train.kernels.triton.shared_expert_combine import shared_expert_combine_triton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE


def check(*rows: torch.Tensor) -> None:
    """With a gate whose logits have about unit variance."""
    size = rows[0].shape[1]
    weight = 2 * size**-0.5 * torch.randn(1, size, device=DEVICE)
    found = errors(shared_expert_combine_triton, shared_expert_combine_reference, [*rows, weight.to(rows[0].dtype)])
    assert max(found) < BOUNDS[rows[0].dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32), (1, 1), (33, 24), (4, 1100)])
def test_output_and_gradients(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check(*(torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(4)))


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
    torch.manual_seed(0)
    check(*(torch.randn(7, 4, 16, device=DEVICE)[:, index] for index in (0, 2, 1, 3)))


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
    torch.manual_seed(0)
    check(*(torch.randn(tokens, 2048, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)))
