"""The check of Gated DeltaNet's operations at the start passes right ones and refuses wrong ones on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.errors import ExitCode, KernelUnavailable
from qwen3next_train.kernels.norms import gated_rms_norm_reference
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.kernels.triton.gated_rms_norm import gated_rms_norm_triton
from qwen3next_train.parallel.control import Json, SingleProcess
from qwen3next_train.selftest import at_startup
from qwen3next_train.selftest.at_startup import (
    checks_meanwhile,
    gated_delta_net_checks,
    reject_wrong_gated_delta_net,
)
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


def crash(**inputs: torch.Tensor) -> None:
    raise RuntimeError("out of resource: shared memory\nmore")


def test_references_are_not_compared_with_themselves() -> None:
    assert gated_delta_net_checks(cpu_kernels(), MODEL, CPU, torch.float32) == []
    before = threading.active_count()
    with checks_meanwhile(cpu_kernels(), MODEL, CPU, torch.float32) as checks:
        assert threading.active_count() == before
    assert checks() == []
    reject_wrong_gated_delta_net([], SingleProcess())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    for operation in ("gated_delta_rule", "gdn_prologue", "gated_rms_norm"):
        kernels = chosen(operation, getattr(cpu_kernels(), operation))
        (check,) = gated_delta_net_checks(kernels, MODEL, CPU, dtype)
        assert check.ok, check.detail


@pytest.mark.parametrize("operation", ["gated_delta_rule", "delta_rule_summary", "delta_state_gradient"])
def test_what_passes_states_is_compared_where_states_are_passed(operation: str) -> None:
    right = chosen(operation, getattr(cpu_kernels(), operation), "fla")
    (check,) = gated_delta_net_checks(right, MODEL, CPU, torch.float32, passes_state=True)
    assert check.ok, check.detail
    wrong = chosen(operation, _without_states(operation), "fla")
    (check,) = gated_delta_net_checks(wrong, MODEL, CPU, torch.float32, passes_state=True)
    assert not check.ok
    assert f"{operation} by fla is off plain torch" in check.detail
    without = gated_delta_net_checks(wrong, MODEL, CPU, torch.float32)
    assert [check.ok for check in without] == ([True] if operation == "gated_delta_rule" else [])


def _without_states(operation: str) -> Callable:
    """Right but for what begins with a state."""
    kernels = cpu_kernels()
    if operation != "gated_delta_rule":
        return lambda *inputs, **named: getattr(kernels, operation)(*inputs, **named).tril()

    def rule(*inputs: torch.Tensor, initial_state_DNKV: torch.Tensor | None = None, **named: Any) -> Any:
        if initial_state_DNKV is not None:
            initial_state_DNKV = 0.9 * initial_state_DNKV
        return kernels.gated_delta_rule(*inputs, initial_state_DNKV=initial_state_DNKV, **named)

    return rule


def test_the_triton_norm_passes() -> None:
    (check,) = gated_delta_net_checks(chosen("gated_rms_norm", gated_rms_norm_triton), MODEL, DEVICE, torch.bfloat16)
    assert check.ok, check.detail


def test_a_wrong_gradient_is_refused_in_one_line() -> None:
    right = cpu_kernels().gated_delta_rule

    def wrong(*, k_THK: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Right values, and a gradient of k that is 3 % too large.
        return right(k_THK=1.03 * k_THK - 0.03 * k_THK.detach(), **inputs)

    checks = gated_delta_net_checks(chosen("gated_delta_rule", wrong, "fla"), MODEL, CPU, torch.float32)
    with pytest.raises(KernelUnavailable) as caught:
        reject_wrong_gated_delta_net(checks, SingleProcess())
    assert str(caught.value) == (
        "kernels.gated_delta_rule: gated_delta_rule by fla is off plain torch by 3.0e-02 (grad k_THK), allowed 1e-02: "
        "it computes wrong results on this machine; set kernels.gated_delta_rule to reference"
    )
    assert caught.value.exit_code == ExitCode.USAGE


def test_what_breaks_off_is_refused_too() -> None:
    checks = gated_delta_net_checks(chosen("gated_delta_rule", crash), MODEL, CPU, torch.float32)
    with pytest.raises(
        KernelUnavailable, match=r"^kernels\.gated_delta_rule: RuntimeError: out of resource: shared memory$"
    ):
        reject_wrong_gated_delta_net(checks, SingleProcess())


def test_one_bad_rank_stops_all() -> None:
    class Two(SingleProcess):
        def gather_json(self, value: Json) -> list[Json]:
            bad = [{**check, "ok": False, "detail": "off"} for check in value]
            return [value, bad]

    kernels = chosen("gated_rms_norm", cpu_kernels().gated_rms_norm)
    checks = gated_delta_net_checks(kernels, MODEL, CPU, torch.float32)
    with pytest.raises(KernelUnavailable, match=r"^kernels\.fused: rank 1: off$"):
        reject_wrong_gated_delta_net(checks, Two())


def test_a_model_built_meanwhile_neither_disturbs_nor_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, num_threads = chosen("gated_rms_norm", cpu_kernels().gated_rms_norm), torch.get_num_threads()
    alone = gated_delta_net_checks(kernels, MODEL, CPU, torch.float32)
    measuring, built = threading.Event(), threading.Event()

    def reference(*inputs: torch.Tensor, **options: float) -> torch.Tensor:
        # Here the checks have set their thread's number of threads to one.
        measuring.set()
        assert built.wait(60)
        return gated_rms_norm_reference(*inputs, **options)

    references = replace(cpu_kernels(), gated_rms_norm=reference)
    monkeypatch.setattr(at_startup, "reference_kernels", lambda: references)
    torch.set_num_threads(3)
    try:
        with checks_meanwhile(kernels, MODEL, CPU, torch.float32) as checks, torch.device("meta"), torch.no_grad():
            assert measuring.wait(60)
            meanwhile = torch.get_num_threads()
            built.set()
            found = checks()
        assert (meanwhile, torch.get_num_threads()) == (3, 3)
    finally:
        torch.set_num_threads(num_threads)
    assert found == alone
    assert found[0].ok, found[0].detail


def test_what_fails_meanwhile_surfaces_beside_a_kernel_that_may_have_caused_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = threading.active_count()
    kernels = chosen("gated_delta_rule", crash)
    with (
        pytest.raises(ValueError, match=r"^no room$"),
        checks_meanwhile(kernels, MODEL, CPU, torch.float32),
    ):
        raise ValueError("no room")
    assert capsys.readouterr().err == "kernels.gated_delta_rule: RuntimeError: out of resource: shared memory\n"
    assert threading.active_count() == before


def test_checks_that_break_off_say_so_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: object, passes_state: bool) -> None:
        raise AssertionError("a mistake of ours")

    monkeypatch.setattr(at_startup, "gated_delta_net_checks", broken)
    with checks_meanwhile(chosen("gated_delta_rule", crash), MODEL, CPU, torch.float32) as checks:
        pass
    with pytest.raises(AssertionError, match=r"^a mistake of ours$"):
        checks()
    # What fails meanwhile still comes first.
    with (
        pytest.raises(ValueError, match=r"^no room$"),
        checks_meanwhile(chosen("gated_delta_rule", crash), MODEL, CPU, torch.float32),
    ):
        raise ValueError("no room")


@pytest.mark.gpu
def test_what_training_takes_on_this_gpu_passes_and_leaves_cpu_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that begin meanwhile, the data loader's and autograd's, would take a number that is set here.
    set_numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_numbers.append)
    model = small_config(
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128
    )
    kernels = select_kernels(KernelsConfig(), DEVICE, model=model)
    with checks_meanwhile(kernels, model, DEVICE, torch.bfloat16) as checks:
        pass
    assert len(checks()) == 3
    assert [check.line() for check in checks() if not check.ok] == []
    assert set_numbers == []
