"""The delta rule over slices against the rule over whole documents: output and every gradient, by each backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen3next_train.batch import BatchSlices
from qwen3next_train.config.schema import KernelsConfig, ModelConfig, RecomputePart
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.gated_delta_rule import DeltaRule, gated_delta_rule_reference
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet, reference_kernels, select_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.recompute import recomputing
from qwen3next_train.model.sequence_group import SlicedSequences, pass_state
from qwen3next_train.row_slices import RowSlice, plan_slices
from qwen3next_train.selftest.case import RandomInputs, relative_error
from qwen3next_train.selftest.mixer_cases import gated_delta_rule
from tests.unit.kernels.comparison import uninitialized_is_nan
from tests.unit.model.replayed_ranks import ReplayedGroup, on_replayed_ranks

HALO = 3
NAMES = ("q_THK", "k_THK", "v_TNV", "g_TN", "beta_TN")
# Over four ranks: slices of 130 tokens; documents across cuts and over a whole slice, at a cut, of one token.
LENGTHS = ((520,), (65, 300, 155), (130, 130, 1, 259), (129, 1, 1, 389))


def operands(lengths: tuple[int, ...], device: torch.device, *, head_dim: int) -> dict[str, torch.Tensor]:
    """In fp64; decays that keep a tenth of the state over a slice, with the slowest heads nearly all of it."""
    draw = RandomInputs(torch.Generator().manual_seed(0), device)
    shape = HeadShape(2, 4, head_dim, head_dim)
    inputs = dict(gated_delta_rule(draw, shape, VarlenMetadata.from_lengths(lengths, device)).inputs)
    inputs["g_TN"] = inputs["g_TN"] / 30
    inputs["upstream"] = draw.normal(*inputs["v_TNV"].shape)
    return inputs


def extended(values: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A slice and before it a halo; of what stands there nothing is to be seen."""
    own = values.unflatten(0, (size, -1))[rank]
    return torch.cat((torch.ones_like(own[:HALO]), own))


def whole(inputs: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    leaves = {name: inputs[name].double().clone().requires_grad_() for name in NAMES}
    sequences = VarlenMetadata.from_lengths(lengths, inputs["g_TN"].device)
    out, _ = gated_delta_rule_reference(**leaves, sequences=sequences)
    out.backward(inputs["upstream"].double())
    return {"output": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}  # type: ignore[dict-item]


def in_slices(
    inputs: dict[str, torch.Tensor], lengths: tuple[int, ...], kernels: KernelSet, *, size: int
) -> dict[str, torch.Tensor]:
    device = inputs["g_TN"].device
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def perform(group: ReplayedGroup) -> dict[str, torch.Tensor]:
        plan = plan_slices(starts, num_rows=1, part=RowSlice(group.rank, size, HALO))
        slices = SlicedSequences.of(BatchSlices.of(plan).to(device), group)
        leaves = [extended(inputs[name], group.rank, size).requires_grad_() for name in NAMES]
        *operands, g_XN, beta_XN = leaves
        out = pass_state(
            DeltaRule(kernels.gated_delta_rule, kernels.delta_rule_summary, kernels.delta_state_gradient),
            *operands,
            g_XN=g_XN,
            beta_XN=beta_XN,
            slices=slices,
        )
        upstream = extended(inputs["upstream"], group.rank, size)
        upstream[:HALO] = 0
        out.backward(upstream)
        found = {"output": out.detach(), **dict(zip(NAMES, (leaf.grad for leaf in leaves), strict=True))}
        for name in NAMES:
            assert not found[name][:HALO].any(), name
        return {name: values[HALO:] for name, values in found.items()}

    found = on_replayed_ranks(size, perform)
    return {name: torch.cat([rank[name] for rank in found]) for name in found[0]}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_plain_torch_in_fp64(lengths: tuple[int, ...], size: int) -> None:
    inputs = operands(lengths, torch.device("cpu"), head_dim=8)
    expected = whole(inputs, lengths)
    found = in_slices(inputs, lengths, reference_kernels(), size=size)
    for name, right in expected.items():
        assert relative_error(found[name], right) < 1e-10, name


class _Identity(torch.autograd.Function):
    """Saves a tensor beside, as a kernel its document starts, and notes which one it gets back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(saved)
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.seen += ctx.saved_tensors
        return grad, None, None


@pytest.mark.parametrize("recompute", [(), ("norms", "activations", "gdn_prologue")])
def test_the_rule_gets_back_the_document_starts_it_saved(recompute: tuple[RecomputePart, ...]) -> None:
    """Not a copy: FlashQLA keeps what it derives from them at the tensor object, and without waits for the device."""
    size, seen = 2, list[torch.Tensor]()
    inputs = operands((40,), torch.device("cpu"), head_dim=8)
    plan = plan_slices(np.array([0, 40]), num_rows=1, part=RowSlice(0, size, HALO))
    slices = SlicedSequences.of(BatchSlices.of(plan), ReplayedGroup(0, {}, size))

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, final = gated_delta_rule_reference(q, k, v, **named)
        assert final is not None
        return _Identity.apply(out, named["sequences"].cu_seqlens, seen), final

    passed = DeltaRule(rule, *DeltaRule.by(gated_delta_rule_reference)[1:])
    *leaves, g_XN, beta_XN = [extended(inputs[name], 0, size).requires_grad_() for name in NAMES]
    with recomputing(recompute):
        out = pass_state(passed, *leaves, g_XN=g_XN, beta_XN=beta_XN, slices=slices)
    out.sum().backward()
    assert len(seen) == 1
    assert seen[0] is slices.scanned.cu_seqlens


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backends_in_bf16_against_whole_documents_in_fp64(backend: str, lengths: tuple[int, ...]) -> None:
    """As far off as the same backend over whole documents: passing a state costs no precision."""
    device = torch.device("cuda")
    names = dict.fromkeys(KernelsConfig.model_fields, "reference") | {"gated_delta_rule": backend}
    try:
        kernels = select_kernels(KernelsConfig.model_validate(names), device, model=ModelConfig())
    except KernelUnavailable as refusal:
        pytest.skip(str(refusal))
    exact = operands(lengths, device, head_dim=128)
    inputs = {name: value.float() if name == "g_TN" else value.bfloat16() for name, value in exact.items()}
    expected = whole(inputs, lengths)
    with uninitialized_is_nan():
        found = in_slices(inputs, lengths, kernels, size=4)
    for name, right in expected.items():
        # The gradient of the decay is a small difference of large terms (selftest.case.CANCELLATION).
        bound = 5e-2 if name == "g_TN" else 1e-2
        assert relative_error(found[name], right) < bound, (name, relative_error(found[name], right))
