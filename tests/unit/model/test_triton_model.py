"""The whole model on the Triton kernels, interpreted on CPU, against the references: loss, gradients, recompute."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import RecomputePart
from qwen3next_train.kernels import selection
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels are compiled for the GPU here"),
]

CONFIG = small_config(linear_key_head_dim=16, linear_value_head_dim=16, mtp_num_layers=0)


def triton_kernels() -> KernelSet:
    """Every own Triton operation, which ``select_kernels`` would refuse on CPU."""
    inputs = selection._load_delta_rule_inputs("triton")
    return replace(cpu_kernels(), **selection._fused_triton(), delta_rule_inputs=inputs)


def run(kernels: KernelSet, recompute: Collection[RecomputePart] = ()) -> dict[str, torch.Tensor]:
    """Loss and gradients of one packed micro-batch."""
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(CONFIG, kernels=kernels, recompute=recompute)
    experts = range(CONFIG.num_experts)
    initialize(model, parameter_table(CONFIG), seed=0, local_experts=experts, device=CPU, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 10)
    batch = PackedBatch.from_rows([PackedRow(tokens, np.array([0, 4, 5, 9]), True)], mtp_depths=0)
    model.begin_step()
    output = model(batch, LossScales([float(count) for count in batch.num_targets], num_micro_batches=1))
    output.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.total.detach(), **gradients}


def test_loss_and_gradients_are_the_references_and_recompute_changes_no_bit() -> None:
    expected, found = run(cpu_kernels()), run(triton_kernels())
    for name, truth in expected.items():
        assert float((found[name] - truth).norm()) <= 1e-5 * float(truth.norm()), name
    again = run(triton_kernels(), ["norms", "activations", "conv_gates"])
    assert [name for name in found if not torch.equal(again[name], found[name])] == []
