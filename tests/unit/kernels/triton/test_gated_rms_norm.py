"""Triton gated RMSNorm against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.norms import gated_rms_norm_reference
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def triton(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # Not at the top: Triton is imported where its kernels are used.
    from qwen3next_train.kernels.triton.gated_rms_norm import gated_rms_norm_triton

    return gated_rms_norm_triton(x, gate, weight, eps=1e-6)


def reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated_rms_norm_reference(x, gate, weight, eps=1e-6)


def check(x: torch.Tensor, gate: torch.Tensor) -> None:
    weight = 1 + torch.randn(x.shape[-1], device=DEVICE).to(x.dtype) / 4
    found = errors(triton, reference, [x, gate, weight])
    assert max(found) < BOUNDS[x.dtype], found


@DTYPES
@pytest.mark.parametrize("shape", [(33, 64), (1, 2), (7, 3, 12), (5, 2, 2, 130)])
def test_triton_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape, device=DEVICE).to(dtype), 2 * torch.randn(shape, device=DEVICE).to(dtype))


def test_triton_reads_a_gate_that_lies_among_other_columns() -> None:
    torch.manual_seed(0)
    projection = torch.randn(9, 2, 40, device=DEVICE)
    check(torch.randn(9, 2, 3, 8, device=DEVICE), projection[..., 16:].unflatten(-1, (3, 8)))
    by_group = torch.randn(9, 2, 3, 8, device=DEVICE).transpose(1, 2)
    check(by_group, projection[..., :24].unflatten(-1, (3, 8)).transpose(1, 2))
    check(torch.randn(2, 9, device=DEVICE), projection[:, :, 0].t())


def test_triton_takes_no_rows_and_zero_rows() -> None:
    x, gate, weight = (torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in ((0, 3, 8), (0, 3, 8), (8,)))
    triton(x, gate, weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    check(torch.zeros(3, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1001, 16384])
def test_at_the_model_s_size(tokens: int) -> None:
    torch.manual_seed(0)
    projection = torch.randn(tokens, 16, 768, device=DEVICE).bfloat16()
    check(torch.randn(tokens, 16, 2, 128, device=DEVICE).bfloat16(), projection[..., 512:].unflatten(-1, (2, 128)))


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    x, gate = (torch.randn(5001, 32, 128, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(128, device=DEVICE).bfloat16().requires_grad_()
    runs = [torch.autograd.grad(triton(x, gate, weight).sum(), (x, gate, weight)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
