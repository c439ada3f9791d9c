"""Do packed documents see each other? A small whole model, MTP included, on documents packed and one by one.

At random initialisation the delta rule forgets within a few tokens, and a leak drowns in rounding. So the decays are
made slow here (A = 0.05), and one document has a single token, which has nothing of its own to hide behind.

Letters: T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import LossScales, ModelOutput, Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.selftest.case import relative_error
from qwen3next_train.selftest.check import Check
from qwen3next_train.selftest.operations import DTYPE_NAMES
from qwen3next_train.topology import Topology

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest relative error between packed and separate; in bf16 rounding alone makes about a hundredth."""

_MTP_DEPTHS = 2
_MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    # The published size: some kernels take no other.
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=4,
    # All of them: a token between two experts would turn a rounding error into another choice.
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    initializer_range=0.1,
    # The balance of the experts is meant to be taken over all documents.
    router_aux_loss_coef=0.0,
    mtp_num_layers=_MTP_DEPTHS,
    mtp_loss_scaling_factor=1.0,
)
_SLOW_RATE = 0.05
_SLOW_DT_BIAS = -2.0


@dataclass(frozen=True)
class Documents:
    """The same documents packed into one row, and each in a row of its own."""

    packed: PackedBatch
    separate: Sequence[PackedBatch]


def packing_check(kernels: KernelSet, device: torch.device, dtype: torch.dtype) -> Check:
    """Whether the selected kernels keep documents apart.

    Args:
        kernels: selected backends.
        device: where the model will live.
        dtype: of weights and activations. Where only references were selected, fp32 is taken, which shows more.
    """
    if all(choice.backend == "reference" for choice in kernels.choices):
        dtype = torch.float32
    model = slowly_forgetting_model(kernels, device, dtype)
    errors = packing_errors(model, random_documents(0, device))
    name, error = max(errors.items(), key=lambda item: item[1])
    ok = error <= BOUNDS[dtype]
    detail = f"packed and separate documents differ by {error:.1e} ({name}) in {DTYPE_NAMES[dtype]}"
    detail = f"{detail}, allowed {BOUNDS[dtype]:.0e}"
    if not ok:
        detail = f"{detail}: documents see each other; find the operation with kernels.OPERATION reference, one by one"
    return Check("packing", ok, detail)


def packing_errors(model: Qwen3NextForCausalLM, documents: Documents) -> dict[str, float]:
    """Relative errors between packed and separate documents.

    Args:
        model: without load-balancing loss; its gradients are overwritten.
        documents: on the model's device.

    Returns:
        ``hidden states`` (the worst document), ``loss`` (next token), ``mtp loss K`` by depth, and ``grad NAME`` of
        every weight.
    """
    packed = documents.packed
    scales = LossScales(packed.num_targets, num_micro_batches=1)
    expected, expected_gradients = _run(model, packed, scales)
    with torch.no_grad():
        hidden_TD = model.forward_hidden(packed)
    worst, start = 0.0, 0
    losses = torch.zeros_like(_losses(expected))
    gradients = {name: torch.zeros_like(gradient) for name, gradient in expected_gradients.items()}
    for alone in documents.separate:
        with torch.no_grad():
            alone_TD = model.forward_hidden(alone)
        worst = max(worst, relative_error(hidden_TD[start : start + alone.num_tokens], alone_TD))
        start += alone.num_tokens
        output, parts = _run(model, alone, scales)
        losses += _losses(output)
        for name, gradient in parts.items():
            gradients[name] += gradient
    errors = {"hidden states": worst}
    for depth, (value, reference) in enumerate(zip(_losses(expected), losses, strict=True)):
        errors[f"mtp loss {depth}" if depth else "loss"] = relative_error(value, reference)
    for name, gradient in expected_gradients.items():
        errors[f"grad {name}"] = relative_error(gradient, gradients[name])
    return errors


def slowly_forgetting_model(kernels: KernelSet, device: torch.device, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    """A small model with both mixers and MTP, whose delta rule remembers for hundreds of tokens."""
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(_MODEL, kernels=kernels)
    table = parameter_table(_MODEL)
    initialize(model, table, seed=0, topology=Topology(), device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(math.log(_SLOW_RATE))
            if name.endswith("dt_bias"):
                parameter.fill_(_SLOW_DT_BIAS)
    return model


def random_documents(seed: int, device: torch.device, *, count: int = 6) -> Documents:
    """Documents of 1 to 80 tokens, two or more, one of them with a single token, never the first."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation([1, *rng.integers(2, 81, size=count - 2)]).tolist()
    lengths.insert(0, int(rng.integers(2, 81)))
    boundaries = np.cumsum([0, *lengths])
    tokens = rng.integers(0, _MODEL.vocab_size, size=boundaries[-1] + 1)
    rows = [PackedRow(tokens, boundaries, False)]
    for start, length in zip(boundaries[:-1], lengths, strict=True):
        rows.append(PackedRow(tokens[start : start + length + 1], np.array([0, length]), False))
    packed, *separate = (PackedBatch.from_rows([row], mtp_depths=_MTP_DEPTHS).to(device) for row in rows)
    return Documents(packed, separate)


def _run(
    model: Qwen3NextForCausalLM, batch: PackedBatch, scales: LossScales
) -> tuple[ModelOutput, dict[str, torch.Tensor]]:
    """Losses and the gradient of every weight, as fp32 or wider."""
    model.zero_grad()
    model.begin_step()
    output = model([batch], scales)[0]
    output.total.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    return output, gradients


def _losses(output: ModelOutput) -> torch.Tensor:
    """Sums of the next-token loss and of each MTP depth's."""
    return torch.cat((output.nll_lm_sum.view(1), output.nll_mtp_sums))
