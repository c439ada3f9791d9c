"""A kernel beside its reference, on the cases of the self-test: outputs and the gradient of every input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import torch

from qwen3next_train.kernels import selection
from qwen3next_train.kernels.selection import KernelSet, reference_kernels
from qwen3next_train.selftest.case import Case, RandomInputs, compare
from tests.unit.kernels.interpreted import DEVICE

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Largest difference from the fp64 reference over the largest value."""


def random(device: torch.device = DEVICE) -> RandomInputs:
    """Draws the same values every time."""
    return RandomInputs(torch.Generator(device).manual_seed(0), device)


@cache
def triton_kernels() -> KernelSet:
    """Every own Triton operation, which ``select_kernels`` would reject on CPU."""
    # Not at the top: Triton is imported where its kernels are used.
    from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

    return replace(reference_kernels(), grouped_matmul=grouped_matmul_triton, **selection._fused_triton())


def check(case: Case, dtype: torch.dtype, **inputs: torch.Tensor) -> dict[str, float]:
    """Compare Triton's with the reference, also on inputs in place of the case's, and return the errors."""
    found = errors(replace(case, inputs={**case.inputs, **inputs}), dtype)
    assert max(found.values()) < BOUNDS[dtype], found
    return found


def errors(case: Case, dtype: torch.dtype, kernels: KernelSet | None = None) -> dict[str, float]:
    """Errors of outputs and gradients against the reference in fp64, by name."""
    return compare(
        partial(case.run, kernels or triton_kernels()),
        partial(case.run, reference_kernels()),
        case.rounded(dtype),
        measure=largest_error,
        around_kernel=uninitialized_is_nan(),
    )


def largest_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude (over 1 where that is 0); infinite if not finite."""
    if value.numel() == 0:
        return 0.0
    scale = float(expected.detach().abs().max())
    difference = float((value.detach().double() - expected.detach().double()).abs().max())
    error = difference / scale if scale > 0 else difference
    return error if error < float("inf") else float("inf")


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that nothing that was not written passes for a result."""
    # Not torch.use_deterministic_algorithms, which does the same and imports torch's compiler for it, for seconds.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
