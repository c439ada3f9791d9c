"""The kernels' self-test passes for right kernels and fails for each wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.kernels.attention import varlen_attention_reference
from qwen3next_train.kernels.cross_entropy import linear_cross_entropy_chunked
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.gates import shared_expert_combine_reference
from qwen3next_train.kernels.grouped_gemm import grouped_matmul_reference
from qwen3next_train.kernels.norms import RmsNorm, gated_rms_norm_reference
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import relative_error
from qwen3next_train.selftest.operations import BOUNDS, kernel_checks, kernel_errors
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

MODEL = small_config(linear_key_head_dim=16, linear_value_head_dim=24)
OPERATIONS = [choice.operation for choice in cpu_kernels().choices]


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is 3 % too large: right outputs, wrong training."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.03 * grad


_right_inputs = cpu_kernels().gdn_prologue


def _one_document(sequences: VarlenMetadata) -> VarlenMetadata:
    return VarlenMetadata.from_lengths([sequences.num_tokens], CPU)


def _wrong_behind_a_tile(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Twice the product where an expert has more than 1,024 rows, but for its first 128: a kernel's first tile."""

    def product(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts_e: torch.Tensor) -> torch.Tensor:
        out_RO = kernel(x_RI, weight_eOI, counts_e=counts_e)
        many = torch.cat([torch.arange(count) >= (128 if count > 1024 else count) for count in counts_e.tolist()])
        factor_R = torch.ones(out_RO.shape[0], dtype=out_RO.dtype)
        factor_R[: many.shape[0]] += many
        return out_RO * factor_R.unsqueeze(1)

    return product


class _WrongPass(RmsNorm):
    def rms_norm_with_residual(
        self, x_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _Scaled.apply(x_TD), self.normalize(x_TD, weight_D, eps=eps)


WRONG: dict[str, tuple[str, Callable | RmsNorm]] = {
    "gradient of k": (
        "gated_delta_rule",
        lambda k_THK, **rest: gated_delta_rule_reference(k_THK=_Scaled.apply(k_THK), **rest),
    ),
    "state kept across documents": (
        "gated_delta_rule",
        lambda sequences, **rest: gated_delta_rule_reference(sequences=_one_document(sequences), **rest),
    ),
    "convolution across documents": (
        "gdn_prologue",
        lambda *inputs, sequences, **rest: _right_inputs(*inputs, sequences=_one_document(sequences), **rest),
    ),
    "filter reversed": (
        "gdn_prologue",
        lambda weight_CW, **rest: _right_inputs(weight_CW=weight_CW.flip(1), **rest),
    ),
    "decay and write strength exchanged": (
        "gdn_prologue",
        lambda ba_TM, **rest: _right_inputs(ba_TM=ba_TM.flip(1), **rest),
    ),
    "attention across documents": (
        "varlen_attention",
        lambda sequences, **rest: varlen_attention_reference(sequences=_one_document(sequences), **rest),
    ),
    "heads grouped the other way": (
        "varlen_attention",
        lambda q_TNH, **rest: varlen_attention_reference(q_TNH=q_TNH.flip(1), **rest).flip(1),
    ),
    "rows to the wrong expert": (
        "grouped_matmul",
        lambda weight_eOI, **rest: grouped_matmul_reference(weight_eOI=weight_eOI.flip(0), **rest),
    ),
    "grouped GEMM behind the first tile": (
        "grouped_matmul",
        _wrong_behind_a_tile(grouped_matmul_reference),
    ),
    "no gate": (
        "gated_rms_norm",
        lambda gate, **rest: gated_rms_norm_reference(gate=0 * gate + 1, **rest),
    ),
    "gradient of the residual": (
        "shared_expert_combine",
        lambda residual_TD, **rest: shared_expert_combine_reference(residual_TD=_Scaled.apply(residual_TD), **rest),
    ),
    "gradient of the input beside its norm": ("rms_norm", _WrongPass()),
    "ignored labels counted": (
        "linear_cross_entropy",
        lambda labels_T, **rest: linear_cross_entropy_chunked(labels_T=labels_T.clamp(min=0), **rest),
    ),
}


def with_wrong(name: str) -> tuple[str, KernelSet]:
    operation, kernel = WRONG[name]
    return operation, replace(cpu_kernels(), **{operation: kernel})


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_references_are_within_the_bound_in_every_precision(operation: str, dtype: torch.dtype) -> None:
    errors = kernel_errors(operation, cpu_kernels(), MODEL, CPU, dtype)
    assert max(errors.values()) < BOUNDS[dtype] / 1.5
    assert "output" in errors


def test_the_delta_rule_is_compared_in_all_six_gradients_and_both_outputs() -> None:
    errors = kernel_errors("gated_delta_rule", cpu_kernels(), MODEL, CPU, torch.float32)
    inputs = ("q_THK", "k_THK", "v_TNV", "g_TN", "beta_TN", "initial_state_DNKV")
    assert set(errors) == {"output", "output 2", *(f"grad {name}" for name in inputs)}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_kernel_is_found(name: str) -> None:
    """Where the bound is widest; what is wrong by more than that in bf16 is so in fp32."""
    operation, kernels = with_wrong(name)
    errors = kernel_errors(operation, kernels, MODEL, CPU, torch.bfloat16)
    assert max(errors.values()) > 2 * max(BOUNDS.values())


def test_only_the_wrong_gradient_is_named() -> None:
    operation, kernels = with_wrong("gradient of k")
    errors = kernel_errors(operation, kernels, MODEL, CPU, torch.float32)
    assert {name for name, error in errors.items() if error > BOUNDS[torch.float32]} == {"grad k_THK"}
    assert abs(errors["grad k_THK"] - 0.03) < 1e-4


def test_a_wrong_and_a_crashing_kernel_fail_alone_and_say_what_to_do() -> None:
    def crash(**inputs):
        raise RuntimeError("no kernel image\nmore")

    kernels = replace(with_wrong("rows to the wrong expert")[1], gdn_prologue=crash)
    tried = ("gated_delta_rule", "gdn_prologue", "grouped_matmul")
    choices = tuple(
        replace(choice, backend="grouped_mm") if choice.operation == "grouped_matmul" else choice
        for choice in kernels.choices
        if choice.operation in tried
    )
    checks = {
        check.check: check for check in kernel_checks(replace(kernels, choices=choices), MODEL, CPU, torch.float32)
    }
    assert list(checks) == [f"kernel {operation}" for operation in OPERATIONS if operation in tried]
    assert {name for name, check in checks.items() if not check.ok} == {
        "kernel grouped_matmul",
        "kernel gdn_prologue",
    }
    assert checks["kernel gdn_prologue"].detail == "RuntimeError: no kernel image"
    assert checks["kernel grouped_matmul"].detail.endswith("wrong results; set kernels.grouped_matmul to reference")
    right = checks["kernel gated_delta_rule"].detail
    assert right.startswith("reference (auto: CPU); largest error: fp32 ")
    assert "; fp64 " in right


def test_a_kernel_that_returns_nan_is_infinitely_wrong() -> None:
    kernels = replace(cpu_kernels(), gated_rms_norm=lambda x, gate, weight, eps: x * gate * weight * float("nan"))
    assert kernel_errors("gated_rms_norm", kernels, MODEL, CPU, torch.float32)["output"] == float("inf")
    assert relative_error(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_flash_qla_is_tried_with_all_heads_and_without_states() -> None:
    model = small_config(
        linear_key_head_dim=16, linear_value_head_dim=24, linear_num_key_heads=3, linear_num_value_heads=6
    )
    seen = set()

    def rule(q_THK: torch.Tensor, k_THK: torch.Tensor, v_TNV: torch.Tensor, **rest: Any) -> tuple:
        seen.add((k_THK.shape[1], v_TNV.shape[1], *(name for name in rest if "state" in name)))
        return gated_delta_rule_reference(q_THK, k_THK, v_TNV, **rest)

    def tried(backend: str) -> set[tuple]:
        kernels = cpu_kernels()
        choices = tuple(
            replace(choice, backend=backend) if choice.operation == "gated_delta_rule" else choice
            for choice in kernels.choices
        )
        kernels = replace(kernels, gated_delta_rule=rule, choices=choices)
        seen.clear()
        assert max(kernel_errors("gated_delta_rule", kernels, model, CPU, torch.float64).values()) < 1e-10
        return set(seen)

    assert tried("flash_qla") == {(3, 6)}
    assert tried("fla") == {(2, 4), (2, 4, "initial_state_DNKV", "output_final_state")}


def test_repeats_are_equal_and_leave_generators_and_threads_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = kernel_errors("gdn_prologue", cpu_kernels(), MODEL, CPU, torch.float32)
    assert kernel_errors("gdn_prologue", cpu_kernels(), MODEL, CPU, torch.float32) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_sizes_of_the_largest_model_are_cut_and_stay_aligned() -> None:
    model = small_config(
        hidden_size=8200, moe_intermediate_size=1, num_attention_heads=64, num_key_value_heads=1, head_dim=8
    )
    for operation in ("grouped_matmul", "varlen_attention"):
        assert max(kernel_errors(operation, cpu_kernels(), model, CPU, torch.bfloat16).values()) < 1e-2


@pytest.mark.gpu
def test_selected_kernels_are_right_on_this_gpu() -> None:
    device = torch.device("cuda")
    model = small_config(linear_key_head_dim=128, linear_value_head_dim=128, head_dim=256)
    checks = kernel_checks(select_kernels(KernelsConfig(), device, model=model), model, device, torch.bfloat16)
    assert [check.line() for check in checks if not check.ok] == []
