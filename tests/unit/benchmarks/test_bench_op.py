"""The benchmark of single operations, every case of it at small sizes on CPU: what it times is the operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gates import swiglu_reference
from qwen3next_train.kernels.selection import KernelSet, reference_kernels
from qwen3next_train.selftest.case import RandomInputs, case_errors
from qwen3next_train.selftest.operations import BOUNDS
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

ONE_WAY = ("summary of a slice", "state gradient of a slice")
"""What nobody differentiates."""
NAMES = [
    *("routing", "sort and permute", "grouped matmul, gate and up", "SwiGLU", "unpermute"),
    *("gated addition", "fan out to four"),
    *(f"{name}, {rows} rows" for name in ("delta rule inputs", "gated delta rule") for rows in ("dense", "packed")),
    *ONE_WAY,
    *("gated RMSNorm", "RMSNorm", "stream + RMSNorm", "sum + RMSNorm", "query norm + rotary", "key norm + rotary"),
    *("output gate", "attention, dense rows", "attention, packed rows", "linear + cross entropy"),
]


def small_cases() -> dict[str, Any]:
    """By name, on 24 tokens."""
    from op_cases import op_cases

    return {case.name: case for case in op_cases(small_config(), dense=(12, 12), packed=(10, 1, 13))}


def measured(name: str, kernels: KernelSet) -> Any:
    """A row of the table."""
    from bench_op import Rates, measure_case

    return measure_case(small_cases()[name], kernels, reference_kernels(), CPU, Rates(1e12, 1e11), 1)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_timed_equals_its_definition(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        built = small_cases()[name].build(RandomInputs(torch.Generator().manual_seed(0), CPU))
        errors = case_errors(built, cpu_kernels(), dtype)
        assert max(errors.values()) < BOUNDS[dtype], errors


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_all_times_and_no_error(name: str) -> None:
    row = measured(name, cpu_kernels())
    assert row.error == 0
    assert min(row.forward_ms, row.both_ms, row.reference_both_ms) > 0
    if name in ONE_WAY:
        assert row.both_limit_ms == row.forward_limit_ms
    else:
        assert row.both_limit_ms > row.forward_limit_ms


def test_a_wrong_operation_is_said() -> None:
    def wrong(gate_up: torch.Tensor, weights_R: torch.Tensor) -> torch.Tensor:
        return swiglu_reference(1.25 * gate_up - 0.25 * gate_up.detach(), weights_R)

    row = measured("SwiGLU", replace(cpu_kernels(), swiglu=wrong))
    assert (row.error, row.worst) == (pytest.approx(0.25, abs=0.01), "grad gate_up")
    assert row.line().endswith("  WRONG")


def test_every_operation_is_timed() -> None:
    asked = set()

    class Recorded:
        def __getattr__(self, name: str) -> object:
            asked.add(name)
            return getattr(cpu_kernels(), name)

    cases = small_cases()
    assert list(cases) == NAMES
    for case in cases.values():
        built = case.build(RandomInputs(torch.Generator().manual_seed(0), CPU))
        built.run(Recorded(), **built.rounded(torch.float32))
    assert asked == {choice.operation for choice in cpu_kernels().choices}


def test_limits_at_the_model_s_sizes() -> None:
    from op_cases import op_cases

    works = [work for case in op_cases(ModelConfig()) for work in (case.forward, case.backward)]
    assert sum(work.num_bytes for work in works) == 55_823_171_584
    assert sum(work.flops for work in works) == 36_272_782_147_584
