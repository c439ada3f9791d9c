"""Triton RMSNorm against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3next_train.kernels.norms import RmsNorm
from qwen3next_train.kernels.triton.rms_norm import RmsNormTriton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE

EPS = 1e-6
KERNEL, REFERENCE = RmsNormTriton(), RmsNorm()
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
        lambda x, y, w: KERNEL.fused_add_rms_norm(x, y, w, eps=EPS),
        lambda x, y, w: REFERENCE.fused_add_rms_norm(x, y, w, eps=EPS),
        [x, y, weight],
    )
    assert max(found) < BOUNDS[x.dtype], found


def check_pass(x: torch.Tensor, weight: torch.Tensor) -> None:
    found = errors(
        lambda x, w: KERNEL.rms_norm_with_residual(x, w, eps=EPS),
        lambda x, w: REFERENCE.rms_norm_with_residual(x, w, eps=EPS),
        [x, weight],
    )
    assert found[0] == 0.0
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


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 48), (33, 64), (5, 130)])
def test_input_beside_its_norm_and_gradients(dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(0)
    check_pass(normal(rows, size, dtype=dtype), normal(size, dtype=dtype) / 4)


def test_what_is_passed_on_is_no_copy() -> None:
    x, weight = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((3, 8), (8,)))
    for backend in (KERNEL, REFERENCE):
        assert backend.rms_norm_with_residual(x, weight, eps=EPS)[0].data_ptr() == x.data_ptr()
    saved = KERNEL.rms_norm_with_residual(x, weight, eps=EPS)[0].grad_fn.saved_tensors
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), weight.data_ptr()]


def test_bf16_gradients_of_stream_and_norm_are_rounded_once() -> None:
    """257 + 1; the norm's 257 by itself is 256 in bf16."""
    x = torch.tensor([[1.0, 1.0]], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, device=DEVICE, dtype=torch.bfloat16)
    passed, normed = KERNEL.rms_norm_with_residual(x, weight, eps=0.0)
    upstream = [torch.tensor([row], device=DEVICE, dtype=torch.bfloat16) for row in ((1.0, -1.0), (258.0, -256.0))]
    (grad,) = torch.autograd.grad((passed, normed), x, upstream)
    assert grad.tolist() == [[258.0, -258.0]]


@pytest.mark.parametrize("name", ["rms_norm_with_residual", "fused_add_rms_norm"])
@pytest.mark.parametrize("used", [(0,), (1,), ()])
def test_outputs_that_nobody_uses(name: str, used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [normal(5, 24, dtype=torch.float32) for _ in range(1 + (name == "fused_add_rms_norm"))]
    upstream = [normal(5, 24, dtype=torch.float32) for _ in range(2)]
    gradients = []
    for backend in (KERNEL, REFERENCE):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, torch.full((24,), 0.5, device=DEVICE))]
        # Doubled, so that what gets no gradient is an operation's result, as in a model.
        outputs = getattr(backend, name)(*(2 * leaf for leaf in leaves), eps=EPS)
        total = sum(((outputs[index] * upstream[index]).sum() for index in used), 0 * leaves[0].sum())
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    wide = normal(9, 4, 48, dtype=torch.float32)
    check_norm(wide[:, :, 16:40], normal(24, dtype=torch.float32) / 4)
    check_norm(wide[:, 1:3], normal(48, dtype=torch.float32) / 4)
    check_sum(wide[:, 0, :24], wide[:, 3, 24:], normal(24, dtype=torch.float32) / 4)
    check_pass(wide[:, 2, 8:32], normal(24, dtype=torch.float32) / 4)


@pytest.mark.parametrize("spread", [lambda x: x.t().contiguous().t(), lambda x: x[:, :1].expand_as(x)])
def test_gradients_that_lie_apart(spread: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    x, weight, *upstream = (normal(*shape, dtype=torch.float32) for shape in ((6, 16), (16,), (6, 16), (6, 16)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    gradients = [
        torch.autograd.grad(
            backend.rms_norm_with_residual(x, weight, eps=EPS), (x, weight), [spread(gradient) for gradient in upstream]
        )
        for backend in (KERNEL, REFERENCE)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    x, weight = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((0, 8), (8,)))
    total, normed = KERNEL.fused_add_rms_norm(x, x, weight, eps=EPS)
    passed, beside = KERNEL.rms_norm_with_residual(x, weight, eps=EPS)
    outputs = total, normed, passed, beside, KERNEL.normalize(x, weight, eps=EPS)
    torch.stack([output.sum() for output in outputs]).sum().backward()
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
    check_pass(x, weight)
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
