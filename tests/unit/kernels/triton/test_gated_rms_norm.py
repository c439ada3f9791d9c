"""Triton gated RMSNorm against plain torch."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.selftest.mixer_cases import gated_rms_norm
from tests.unit.kernels.comparison import check, random, triton_kernels
from tests.unit.kernels.interpreted import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 64), (1, 2), (7, 3, 12), (5, 2, 2, 130)])
def test_triton_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(gated_rms_norm(random(), shape), dtype)


def test_triton_reads_a_gate_that_lies_among_other_columns() -> None:
    check(gated_rms_norm(random(), (9, 2, 3, 8), columns=40), torch.float32)
    draw = random()
    projection, by_group = draw.normal(9, 2, 40), draw.normal(9, 2, 3, 8).transpose(1, 2)
    gate = projection[..., :24].unflatten(-1, (3, 8)).transpose(1, 2)
    check(gated_rms_norm(draw, (9, 3, 2, 8)), torch.float32, x=by_group, gate=gate)
    check(gated_rms_norm(draw, (2, 9)), torch.float32, gate=projection[:, :, 0].t())


def test_triton_takes_no_rows_and_zero_rows() -> None:
    x, gate, weight = (torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in ((0, 3, 8), (0, 3, 8), (8,)))
    triton_kernels().gated_rms_norm(x, gate, weight, eps=1e-6).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    check(gated_rms_norm(random(), (3, 16)), torch.float32, x=torch.zeros(3, 16, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1001, 16384])
def test_at_the_model_s_size(tokens: int) -> None:
    check(gated_rms_norm(random(), (tokens, 16, 2, 128), columns=768), torch.bfloat16)


@pytest.mark.gpu
def test_repeated_gradients_are_equal_bit_for_bit() -> None:
    x, gate = (torch.randn(5001, 32, 128, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(128, device=DEVICE).bfloat16().requires_grad_()
    norm = triton_kernels().gated_rms_norm
    runs = [torch.autograd.grad(norm(x, gate, weight, eps=1e-6).sum(), (x, gate, weight)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))
