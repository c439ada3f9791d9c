"""The gated norm in plain torch against its definition; tests/unit/model has the other norms."""

from __future__ import annotations

from functools import partial

import torch

from qwen3next_train.kernels.norms import gated_rms_norm_reference
from qwen3next_train.kernels.selection import reference_kernels
from qwen3next_train.selftest.mixer_cases import gated_rms_norm
from tests.unit.kernels.comparison import largest_error, random
from tests.unit.kernels.packing import CPU


def test_gated_norm_equals_its_definition() -> None:
    case = gated_rms_norm(random(CPU), (5, 3, 8), eps=1e-3)
    value, expected = (run(**case.inputs)[0] for run in (partial(case.run, reference_kernels()), case.definition))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_gated_norm_in_bf16_is_rounded_once() -> None:
    case = gated_rms_norm(random(CPU), (200, 16))
    inputs = case.rounded(torch.bfloat16)
    (value,) = case.run(reference_kernels(), **inputs)
    (exact,) = case.definition(**{name: x.double() for name, x in inputs.items()})
    assert value.dtype == torch.bfloat16
    assert float(((value.double() - exact) / exact).abs().max()) <= 2**-8


def test_gated_norm_of_zero_input_gives_zero_and_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    gated_rms_norm_reference(x, torch.ones(2, 4), torch.ones(4), eps=1e-6).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert largest_error(gated_rms_norm_reference(x, torch.ones(2, 4), torch.ones(4), eps=1e-6), x * 0) == 0
