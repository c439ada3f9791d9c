"""Recompute with the CUDA kernels: the same gradients, and as many bytes less as accounting says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3next_train.accounting.activations import activation_bytes
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import RecomputePart
from qwen3next_train.model.qwen3_next import LossScales
from tests.unit.model.test_cuda_training import LENGTH, MODEL, ROWS, batch, build, step

pytestmark = pytest.mark.gpu

CHEAP: tuple[RecomputePart, ...] = ("norms", "activations", "gdn_prologue")
KINDS = ("activations_gdn", "activations_attention", "activations_moe", "activations_other")


@pytest.mark.parametrize("recompute", [("activations",), ("gdn_prologue",), ("layer",), CHEAP], ids="+".join)
def test_gradients_are_bit_equal(monkeypatch: pytest.MonkeyPatch, recompute: tuple[RecomputePart, ...]) -> None:
    """Packed rows in bf16; twice, so that what was tuned in the first run is settled."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    # Norms that are computed again are not fused with the sum before them: the others are compared with a model whose
    # norms are computed by the same kernels.
    model.recompute = ("norms",) if "norms" in recompute else ()
    data = batch(0, packed=True).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        step(model, data)
        loss = step(model, data)
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.recompute = recompute
        assert torch.equal(step(model, data), loss)
    finally:
        torch.use_deterministic_algorithms(False)
    different = [
        name for name, parameter in model.named_parameters() if not torch.equal(parameter.grad, expected[name])
    ]
    assert different == []


def test_norms_change_gradients_by_rounding_alone() -> None:
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    data = batch(0, packed=True).to(device)
    loss = step(model, data)
    expected = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.recompute = ("norms",)
    assert torch.equal(step(model, data), loss)
    for name, parameter in model.named_parameters():
        error = torch.linalg.vector_norm(parameter.grad.double() - expected[name])
        assert error < 2**-6 * torch.linalg.vector_norm(expected[name]), name


@pytest.mark.parametrize("recompute", [CHEAP, ("layer",)], ids="+".join)
def test_nothing_waits_for_the_device(recompute: tuple[RecomputePart, ...]) -> None:
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    model.recompute = recompute
    data = batch(0, packed=True).to(device)
    for _ in range(2):
        step(model, data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bytes_between_passes(recompute: tuple[RecomputePart, ...]) -> int:
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    model.recompute = recompute
    data = batch(0, packed=False).to(device)
    step(model, data)
    model.zero_grad(set_to_none=True)
    model.begin_step()
    before = torch.cuda.memory_allocated()
    output = model([data], LossScales([float(count) for count in data.num_targets], num_micro_batches=1))[0]
    between = torch.cuda.memory_allocated() - before
    output.total.backward()
    return between


@pytest.mark.parametrize("recompute", [*((part,) for part in CHEAP), CHEAP, ("layer",)], ids="+".join)
def test_saved_bytes_are_those_of_the_accounting(recompute: tuple[RecomputePart, ...]) -> None:
    """Within 5 %, and a few kilobytes a layer that do not depend on the number of tokens."""
    layout = Layout(1, 1, 1, "bf16", ROWS, LENGTH)
    counted = [
        sum(activation_bytes(MODEL, replace(layout, recompute=frozenset(parts)))[kind] for kind in KINDS)
        for parts in ((), recompute)
    ]
    measured = _bytes_between_passes(()) - _bytes_between_passes(recompute)
    assert measured == pytest.approx(counted[0] - counted[1], rel=0.05, abs=5 * 64 * 1024)
