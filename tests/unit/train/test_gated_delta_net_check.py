"""The check of Gated DeltaNet's operations at the start passes right ones and refuses wrong ones on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.errors import ExitCode, KernelUnavailable
from qwen3next_train.kernels.gated_rms_norm.triton_backend import gated_rms_norm_triton
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.parallel.control import Json, SingleProcess
from qwen3next_train.train.gated_delta_net_check import gated_delta_net_checks, refuse_wrong_gated_delta_net
from tests.unit.kernels.interpreted import DEVICE
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

MODEL = small_config()


def chosen(operation: str, kernel: Callable, backend: str = "triton") -> KernelSet:
    """Kernels of which one counts as no reference."""
    kernels = cpu_kernels()
    choices = tuple(
        replace(choice, backend=backend) if choice.operation == operation else choice for choice in kernels.choices
    )
    return replace(kernels, **{operation: kernel}, choices=choices)


def test_references_are_not_compared_with_themselves() -> None:
    assert gated_delta_net_checks(cpu_kernels(), MODEL, CPU, torch.float32) == []
    refuse_wrong_gated_delta_net(cpu_kernels(), MODEL, CPU, torch.float32, SingleProcess())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    for operation in ("gated_delta_rule", "delta_rule_inputs", "gated_rms_norm"):
        kernels = chosen(operation, getattr(cpu_kernels(), operation))
        (check,) = gated_delta_net_checks(kernels, MODEL, CPU, dtype)
        assert check.ok, check.detail


def test_the_triton_norm_passes() -> None:
    (check,) = gated_delta_net_checks(chosen("gated_rms_norm", gated_rms_norm_triton), MODEL, DEVICE, torch.bfloat16)
    assert check.ok, check.detail


def test_a_wrong_gradient_is_refused_in_one_line() -> None:
    right = cpu_kernels().gated_delta_rule

    def wrong(*, k_THK: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Right values, and a gradient of k that is 3 % too large.
        return right(k_THK=1.03 * k_THK - 0.03 * k_THK.detach(), **inputs)

    with pytest.raises(KernelUnavailable) as caught:
        refuse_wrong_gated_delta_net(
            chosen("gated_delta_rule", wrong, "fla"), MODEL, CPU, torch.float32, SingleProcess()
        )
    assert str(caught.value) == (
        "kernels.gated_delta_rule: gated_delta_rule by fla is off plain torch by 3.0e-02 (grad k_THK), allowed 1e-02: "
        "it computes wrong results on this machine; set kernels.gated_delta_rule to reference"
    )
    assert caught.value.exit_code == ExitCode.USAGE


def test_what_breaks_off_is_refused_too() -> None:
    def crash(**inputs: torch.Tensor) -> None:
        raise RuntimeError("out of resource: shared memory\nmore")

    with pytest.raises(
        KernelUnavailable, match=r"^kernels\.gated_delta_rule: RuntimeError: out of resource: shared memory$"
    ):
        refuse_wrong_gated_delta_net(chosen("gated_delta_rule", crash), MODEL, CPU, torch.float32, SingleProcess())


def test_one_bad_rank_stops_all() -> None:
    class Two(SingleProcess):
        def gather_json(self, value: Json) -> list[Json]:
            bad = [{**check, "ok": False, "detail": "off"} for check in value]
            return [value, bad]

    kernels = chosen("gated_rms_norm", cpu_kernels().gated_rms_norm)
    with pytest.raises(KernelUnavailable, match=r"^kernels\.fused: rank 1: off$"):
        refuse_wrong_gated_delta_net(kernels, MODEL, CPU, torch.float32, Two())


@pytest.mark.gpu
def test_what_training_takes_on_this_gpu_passes() -> None:
    model = small_config(
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128
    )
    kernels = select_kernels(KernelsConfig(), DEVICE)
    checks = gated_delta_net_checks(kernels, model, DEVICE, torch.bfloat16)
    assert len(checks) == 3
    assert [check.line() for check in checks if not check.ok] == []
