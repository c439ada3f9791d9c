"""Sums of the gradients of one tensor's consumers, against autograd's own."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.triton.shared_input import shared_input_triton
from qwen3next_train.selftest.case import Case
from qwen3next_train.selftest.moe_cases import shared_input
from tests.unit.kernels.comparison import check, random
from tests.unit.kernels.interpreted import DEVICE


def check_input(case: Case, dtype: torch.dtype, **inputs: torch.Tensor) -> None:
    found = check(case, dtype, **inputs)
    assert max(error for name, error in found.items() if name.startswith("output")) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_sum_of_gradients(dtype: torch.dtype, count: int) -> None:
    check_input(shared_input(random(), 33, 70, count), dtype)
    check_input(shared_input(random(), 9, 16, count), dtype, x=random().normal(9, 3, 16)[:, 1])


def test_bf16_is_rounded_once() -> None:
    x = torch.zeros(1, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    upstream = [torch.tensor([value], device=DEVICE, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    torch.autograd.backward(shared_input_triton(x, 3), upstream)
    assert x.grad is not None
    assert x.grad.item() == 258.0


def test_consumers_that_are_not_there() -> None:
    x = torch.ones(5, device=DEVICE, requires_grad=True)
    for used in ([0], [1, 3], [0, 1, 2]):
        shares = shared_input_triton(x, 4)
        assert all(share.data_ptr() == x.data_ptr() for share in shares)
        total = torch.stack([(index + 1) * shares[index] for index in used]).sum()
        (grad,) = torch.autograd.grad(total, x)
        assert grad.tolist() == [float(sum(used) + len(used))] * 5
    empty = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.stack(shared_input_triton(empty, 2)).sum(), empty)
    assert grad.shape == (0, 4)


@pytest.mark.gpu
def test_at_the_model_s_size() -> None:
    check_input(shared_input(random(), 1001, 2048, 4), torch.bfloat16)
