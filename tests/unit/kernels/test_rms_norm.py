"""Triton RMSNorm against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.rms_norm.reference import RmsNormReference
from qwen3next_train.kernels.rms_norm.triton_backend import RmsNormTriton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE

EPS = 1e-6
KERNEL, REFERENCE = RmsNormTriton(), RmsNormReference()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    found = errors(
        lambda x, w: KERNEL.normalize(x, w, eps=EPS), lambda x, w: REFERENCE.normalize(x, w, eps=EPS), [x, weight]
    )
    assert max(found) < BOUNDS[x.dtype], found


def check_sum(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    found = errors(
        lambda x, y, w: KERNEL.add_and_normalize(x, y, w, eps=EPS),
        lambda x, y, w: REFERENCE.add_and_normalize(x, y, w, eps=EPS),
        [x, y, weight],
    )
    assert max(found) < BOUNDS[x.dtype], found


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 48), (33, 64), (5, 130)])
def test_norm_and_gradients(dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(0)
    check_norm(normal(rows, size, dtype=dtype), normal(size, dtype=dtype) / 4)


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(7, 48), (33, 64)])
def test_sum_and_norm_and_gradients(dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(0)
    check_sum(normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype), normal(size, dtype=dtype) / 4)


def test_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    wide = normal(9, 4, 48, dtype=torch.float32)
    check_norm(wide[:, :, 16:40], normal(24, dtype=torch.float32) / 4)
    check_norm(wide[:, 1:3], normal(48, dtype=torch.float32) / 4)
    check_sum(wide[:, 0, :24], wide[:, 3, 24:], normal(24, dtype=torch.float32) / 4)


def test_no_rows() -> None:
    x, weight = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((0, 8), (8,)))
    total, normed = KERNEL.add_and_normalize(x, x, weight, eps=EPS)
    (total.sum() + normed.sum() + KERNEL.normalize(x, weight, eps=EPS).sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 8)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_zero_rows_have_finite_gradients() -> None:
    x = torch.zeros(3, 16, device=DEVICE)
    check_norm(x, normal(16, dtype=torch.float32) / 4)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1001, 16384])
def test_at_the_model_s_size(rows: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x, y, weight = normal(rows, 2048, dtype=dtype), normal(rows, 2048, dtype=dtype), normal(2048, dtype=dtype) / 4
    check_norm(x, weight)
    check_sum(x, y, weight)
    wide = normal(rows, 16, 512, dtype=dtype)
    check_norm(wide[:, :, :256], normal(256, dtype=dtype) / 4)


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    x = normal(5001, 2048, dtype=torch.bfloat16).requires_grad_()
    weight = normal(2048, dtype=torch.bfloat16).requires_grad_()
    runs = [torch.autograd.grad(KERNEL.normalize(x, weight, eps=EPS).sum(), (x, weight)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
