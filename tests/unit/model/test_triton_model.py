"""The whole model on the Triton kernels, interpreted on CPU, against the references: loss, gradients, recompute."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import RecomputePart
from qwen3next_train.kernels import selection
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.triton.rms_norm import RmsNormTriton
from qwen3next_train.model.init import initialize
from qwen3next_train.model.norms import FusedAddRmsNorm, RmsNormWithResidual
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from qwen3next_train.model.recompute import recomputing
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from tests.unit.model.small_models import CPU, cpu_kernels, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels are compiled for the GPU here"),
]

CHEAP: tuple[RecomputePart, ...] = ("norms", "activations", "gdn_prologue")
CONFIG = small_config(linear_key_head_dim=16, linear_value_head_dim=16, mtp_num_layers=0)


def triton_kernels() -> KernelSet:
    """Every own Triton operation, which ``select_kernels`` would refuse on CPU."""
    return replace(cpu_kernels(), **selection._fused_triton())


def run(kernels: KernelSet, recompute: Collection[RecomputePart] = ()) -> dict[str, torch.Tensor]:
    """Loss and gradients of one packed micro-batch."""
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(CONFIG, kernels=kernels, recompute=recompute)
    initialize(model, parameter_table(CONFIG), seed=0, topology=Topology(), device=CPU, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 10)
    batch = PackedBatch.from_rows([PackedRow(tokens, np.array([0, 4, 5, 9]), True)], mtp_depths=0)
    model.begin_step()
    output = model([batch], LossScales([float(count) for count in batch.num_targets], num_micro_batches=1))[0]
    output.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.total.detach(), **gradients}


def test_loss_and_gradients_are_the_references_and_recompute_changes_no_bit() -> None:
    expected, found = run(cpu_kernels()), run(triton_kernels())
    for name, reference in expected.items():
        assert float((found[name] - reference).norm()) <= 1e-5 * float(reference.norm()), name
    again = run(triton_kernels(), CHEAP)
    assert [name for name in found if not torch.equal(again[name], found[name])] == []


@pytest.mark.parametrize("kind", [RmsNormWithResidual, FusedAddRmsNorm])
def test_norms_that_are_rebuilt_round_their_gradients_as_often_as_the_others(kind: type[nn.Module]) -> None:
    """In bf16; of integers, because the interpreter cuts off what is rounded on the GPU."""
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randint(-9, 9, (7, 32), generator=generator).bfloat16() for _ in range(2)]
    upstream = [torch.randn(7, 32, generator=generator).bfloat16() for _ in range(2)]
    norm = kind(32, 1e-6, RmsNormTriton()).bfloat16()
    torch.nn.init.constant_(norm.weight, 0.25)
    gradients = []
    for parts in ((), CHEAP):
        inputs = [stream.clone().requires_grad_() for stream in streams[: 1 + (kind is FusedAddRmsNorm)]]
        with recomputing(parts):
            total_TD, normed_TD = norm(*(1 * stream for stream in inputs))
            loss = (total_TD * upstream[0]).sum() + (normed_TD * normed_TD * upstream[1]).sum()
        gradients.append(torch.autograd.grad(loss, (*inputs, norm.weight)))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


class _Additions(TorchDispatchMode):
    """Counts torch's own additions of two tensors of a shape, autograd's sums of gradients among them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._shape = shape
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Collection[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and result.shape == self._shape
        return result


def test_no_pass_over_the_residual_stream_is_torchs() -> None:
    """What is left are the gradients of the mixers' inputs: two products in Gated DeltaNet, three in attention."""
    additions = _Additions(9, CONFIG.hidden_size)
    with additions:
        run(triton_kernels())
    assert additions.count == 1 + 2
