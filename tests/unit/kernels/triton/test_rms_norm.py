"""Triton RMSNorm against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3next_train.kernels.norms import RmsNorm
from qwen3next_train.kernels.triton.rms_norm import RmsNormTriton
from qwen3next_train.selftest.dense_cases import rms_norm
from tests.unit.kernels.comparison import check, random
from tests.unit.kernels.interpreted import DEVICE

EPS = 1e-6
KERNEL, REFERENCE = RmsNormTriton(), RmsNorm()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def check_norm(method: str, rows: int, size: int, dtype: torch.dtype = torch.float32, **inputs: torch.Tensor) -> None:
    found = check(rms_norm(random(), rows, size, method), dtype, **inputs)
    assert found["output"] == 0.0 or method != "rms_norm_with_residual"


@DTYPES
@pytest.mark.parametrize("method", ["normalize", "fused_add_rms_norm", "rms_norm_with_residual"])
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 48), (33, 64), (5, 130)])
def test_norm_and_gradients(method: str, dtype: torch.dtype, rows: int, size: int) -> None:
    check_norm(method, rows, size, dtype)


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
    wide = random().normal(9, 4, 48)
    check_norm("normalize", 9, 24, x_TD=wide[:, :, 16:40])
    check_norm("normalize", 9, 48, x_TD=wide[:, 1:3])
    check_norm("fused_add_rms_norm", 9, 24, x_TD=wide[:, 0, :24], y_TD=wide[:, 3, 24:])
    check_norm("rms_norm_with_residual", 9, 24, x_TD=wide[:, 2, 8:32])


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
    check_norm("normalize", 3, 16, x_TD=torch.zeros(3, 16, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1001, 16384])
def test_at_the_model_s_size(rows: int) -> None:
    for method in ("normalize", "fused_add_rms_norm", "rms_norm_with_residual"):
        check_norm(method, rows, 2048, torch.bfloat16)
    check_norm("normalize", rows, 256, torch.bfloat16, x_TD=random().normal(rows, 16, 512)[:, :, :256])


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    x = normal(5001, 2048, dtype=torch.bfloat16).requires_grad_()
    weight = normal(2048, dtype=torch.bfloat16).requires_grad_()
    runs = [torch.autograd.grad(KERNEL.normalize(x, weight, eps=EPS).sum(), (x, weight)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
