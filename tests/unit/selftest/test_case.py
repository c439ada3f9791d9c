"""The one comparison of a kernel and its reference, with what the unit tests of Triton's kernels add to it."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.selftest.case import Case, Outputs, RandomInputs, case_errors, compare
from tests.unit.kernels.comparison import largest_error, uninitialized_is_nan
from tests.unit.model.small_models import CPU, cpu_kernels


def doubled(x: torch.Tensor) -> Outputs:
    return (2 * x,)


class _LeavesSomeUnwritten(torch.autograd.Function):
    """Twice its input; only the first row of the gradient is written."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        out = torch.empty_like(grad)
        out[0] = 2 * grad[0]
        return out


@pytest.mark.parametrize("view", [lambda x: x[:, 1], lambda x: x.transpose(0, 1)[1:], lambda x: x])
def test_a_view_reaches_the_kernel_as_it_lies_and_gets_the_gradient_of_its_base(view) -> None:
    x, seen = view(torch.arange(12.0).view(3, 4).clone()), []

    def kernel(x: torch.Tensor) -> Outputs:
        seen.append((x.stride(), x.storage_offset()))
        return doubled(x)

    assert compare(kernel, doubled, {"x": x}) == {"output": 0.0, "grad x": 0.0}
    assert seen == [(x.stride(), x.storage_offset())]
    off = compare(lambda x: (2 * x.detach() + 3 * (x - x.detach()),), doubled, {"x": x})
    assert off == {"output": 0.0, "grad x": pytest.approx(0.5)}


@pytest.mark.parametrize("shape", [(4, 3), (4, 40)])
def test_what_is_not_written_is_found(shape: tuple[int, int]) -> None:
    found = compare(
        lambda x: (_LeavesSomeUnwritten.apply(x),),
        doubled,
        {"x": torch.ones(shape)},
        measure=largest_error,
        around_kernel=uninitialized_is_nan(),
    )
    assert found == {"output": 0.0, "grad x": float("inf")}
    assert torch.get_deterministic_debug_mode() == 0


def test_the_reference_runs_in_fp64_or_as_the_kernel_does() -> None:
    seen = []

    def reference(x: torch.Tensor) -> Outputs:
        seen.append(x.dtype)
        return doubled(x)

    inputs = {"x": torch.ones(2, dtype=torch.bfloat16)}
    for dtype in (torch.float64, None):
        compare(doubled, reference, inputs, reference_dtype=dtype)
    assert seen == [torch.float64, torch.bfloat16]


def test_inputs_that_stay_in_fp32_and_gradients_that_cancel() -> None:
    inputs = {name: torch.tensor([1 / 3], dtype=torch.float64) for name in ("x", "rate")}

    def run(kernels: object, x: torch.Tensor, rate: torch.Tensor) -> Outputs:
        return (x + 1.1 * rate - 0.1 * rate.detach(),)

    case = Case(inputs, run, lambda x, rate: (x + rate,), frozenset({"rate"}), frozenset({"rate"}))
    assert {name: x.dtype for name, x in case.rounded(torch.bfloat16).items()} == {
        "x": torch.bfloat16,
        "rate": torch.float32,
    }
    assert case_errors(case, cpu_kernels(), torch.float32)["grad rate"] == pytest.approx(0.1)
    assert case_errors(case, cpu_kernels(), torch.bfloat16)["grad rate"] == pytest.approx(0.02)


def test_draws_are_fp64_and_repeat() -> None:
    first, second = (RandomInputs(torch.Generator().manual_seed(3), CPU) for _ in range(2))
    assert torch.equal(first.normal(2, 3), second.normal(2, 3))
    uniform = first.uniform(1000)
    assert uniform.dtype == torch.float64
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
