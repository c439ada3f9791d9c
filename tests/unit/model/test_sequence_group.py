"""Mixers over slices of rows against the same mixers over whole rows, in fp64: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwen3next_train.batch import BatchSlices, PackedBatch, PackedRow
from qwen3next_train.config.schema import ModelConfig, RecomputePart
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.gated_attention import GatedAttention
from qwen3next_train.model.gated_delta_net import GatedDeltaNet
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.model.recompute import recomputing
from qwen3next_train.model.rope import RotaryTable, rotary_table
from qwen3next_train.model.sequence_group import SlicedSequences, arriving_states, leaving_gradients
from qwen3next_train.row_slices import RowSlice, SlicePlan, plan_slices
from tests.unit.model.ranks_as_threads import ThreadGroup, on_ranks
from tests.unit.model.small_models import build, cpu_kernels, scales_of, small_config

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=12,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_key_head_dim=4,
    linear_value_head_dim=6,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_conv_kernel_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
)
HALO = MODEL.linear_conv_kernel_dim - 1
# Over two ranks of 8 tokens: one document; across the cut; at the cut; shorter than a slice; single tokens; two rows.
PACKINGS = {
    "one document": (1, [16]),
    "across the cut": (1, [5, 6, 5]),
    "at the cut": (1, [8, 8]),
    "at the cut and across the next": (1, [4, 7, 5]),
    "shorter than a slice": (1, [3, 2, 2, 3, 1, 5]),
    "within a halo of the cut": (1, [6, 4, 6]),
    "single tokens around the cut": (1, [6, 1, 1, 1, 1, 6]),
    "two rows": (2, [16, 3, 10, 3]),
}


def cumulated(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def mixer(kind: str) -> nn.Module:
    """In fp64, with a delta rule that remembers for tens of tokens."""
    torch.manual_seed(0)
    layer = {"gdn": GatedDeltaNet, "attention": GatedAttention}[kind](MODEL, cpu_kernels()).double()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        if name == "A_log":
            nn.init.constant_(parameter, -3.0)
    return layer


def rotary(positions: torch.Tensor) -> RotaryTable:
    return rotary_table(positions, head_dim=MODEL.head_dim, fraction=0.5, theta=100.0)


def whole_rows(
    layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor, lengths: list[int]
) -> dict[str, torch.Tensor]:
    """Output and gradients over whole rows."""
    sequences = VarlenMetadata.from_lengths(lengths, torch.device("cpu"))
    leaf = x.clone().requires_grad_()
    angles = (rotary(torch.arange(len(x))),) if isinstance(layer, GatedAttention) else ()
    out = layer(leaf, sequences, *angles)
    out.backward(upstream)
    return {"output": out.detach(), "grad x": leaf.grad, **gradients(layer)}


def gradients(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Taken out of the layer."""
    found = {f"grad {name}": parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return found  # type: ignore[return-value]


def sliced(batch: SlicePlan, group: ThreadGroup) -> SlicedSequences:
    return SlicedSequences.of(BatchSlices.of(batch), group)


def in_slices(
    kind: str,
    x: torch.Tensor,
    upstream: torch.Tensor,
    lengths: list[int],
    *,
    num_rows: int,
    size: int,
    recompute: tuple[RecomputePart, ...] = (),
) -> dict[str, torch.Tensor]:
    """The same over ``size`` ranks: outputs and gradients of tokens put together, of parameters added up."""

    def own(values: torch.Tensor, rank: int) -> torch.Tensor:
        return values.unflatten(0, (num_rows, size, -1))[:, rank].flatten(0, 1)

    # Not in the threads, which share one generator of random numbers.
    layers = [mixer(kind) for _ in range(size)]

    def perform(group: ThreadGroup) -> dict[str, torch.Tensor]:
        layer = layers[group.rank]
        slices = sliced(plan_slices(cumulated(lengths), num_rows=num_rows, part=part(group)), group)
        leaf = own(x, group.rank).clone().requires_grad_()
        angles = (rotary(own(torch.arange(len(x)), group.rank)),) if kind == "attention" else ()
        pieces = VarlenMetadata(*2 * (torch.from_numpy(slices.plan.pieces),))
        with recomputing(recompute):
            out = layer(leaf * 1, pieces, *angles, slices)
        out.backward(own(upstream, group.rank))
        return {"output": out.detach(), "grad x": leaf.grad, **gradients(layer)}

    found = on_ranks(size, perform)

    def together(name: str) -> torch.Tensor:
        parts = [rank[name] for rank in found]
        if name not in ("output", "grad x"):
            return torch.stack(parts).sum(0)
        return torch.stack([values.unflatten(0, (num_rows, -1)) for values in parts], dim=1).flatten(0, 2)

    return {name: together(name) for name in found[0]}


def part(group: ThreadGroup) -> RowSlice:
    return RowSlice(group.rank, group.size, HALO)


def largest_difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Relative, but for gradients that are 0 up to rounding: of the queries of documents of one token."""
    assert expected.keys() == found.keys()
    largest = max(float(right.norm()) for right in expected.values())
    return max(
        float((found[name] - right).norm()) / max(float(right.norm()), 1e-3 * largest)
        for name, right in expected.items()
    )


def difference(kind: str, num_rows: int, lengths: list[int], size: int, **options: object) -> float:
    torch.manual_seed(1)
    x, upstream = torch.randn(2, sum(lengths), MODEL.hidden_size, dtype=torch.float64)
    expected = whole_rows(mixer(kind), x, upstream, lengths)
    found = in_slices(kind, x, upstream, lengths, num_rows=num_rows, size=size, **options)  # type: ignore[arg-type]
    return largest_difference(expected, found)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["gdn", "attention"])
@pytest.mark.parametrize(("num_rows", "lengths"), PACKINGS.values(), ids=PACKINGS)
def test_a_mixer_over_slices_is_that_over_rows(kind: str, num_rows: int, lengths: list[int], size: int) -> None:
    assert difference(kind, num_rows, lengths, size) < 1e-12


@pytest.mark.parametrize("recompute", [("norms",), ("gdn_prologue",), ("norms", "activations", "gdn_prologue")])
@pytest.mark.parametrize("kind", ["gdn", "attention"])
def test_recomputed_parts_change_nothing(kind: str, recompute: tuple[RecomputePart, ...]) -> None:
    assert difference(kind, 1, [5, 6, 5], 2, recompute=recompute) < 1e-12


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Rows, lengths of their documents and ranks, slices no shorter than the halo."""
    num_rows, size = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    length = size * draw(st.integers(HALO, 6))
    lengths = []
    for _ in range(num_rows):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=6)))
        lengths += np.diff([0, *cuts, length]).tolist()
    return num_rows, lengths, size


@settings(max_examples=25, deadline=None)
@given(packings(), st.sampled_from(["gdn", "attention"]))
def test_any_documents(packing: tuple[int, list[int], int], kind: str) -> None:
    assert difference(kind, *packing) < 1e-12


def test_no_state_and_no_halo_cross_a_documents_beginning() -> None:
    """Whatever stands in the documents before, to the last bit; also in the gradients of what is before."""
    lengths, size = [5, 3, 8], 2
    torch.manual_seed(1)
    x, upstream = torch.randn(2, 16, MODEL.hidden_size, dtype=torch.float64)
    others = torch.cat((torch.randn(8, MODEL.hidden_size, dtype=torch.float64), x[8:]))
    upstream[:8] = 0
    for kind in ("gdn", "attention"):
        one, two = (in_slices(kind, each, upstream, lengths, num_rows=1, size=size) for each in (x, others))
        assert torch.equal(one["output"][8:], two["output"][8:])
        assert torch.equal(one["grad x"][8:], two["grad x"][8:])
        assert not one["grad x"][:8].any()


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[SlicePlan], torch.Generator]:
    num_rows, lengths, size = draw(packings())
    made = [plan_slices(cumulated(lengths), num_rows=num_rows, part=RowSlice(rank, size, HALO)) for rank in range(size)]
    return made, torch.Generator().manual_seed(draw(st.integers(0, 99)))


@settings(deadline=None)
@given(chains())
def test_leaving_gradients_are_the_gradients_of_arriving_states(chain: tuple[list[SlicePlan], torch.Generator]) -> None:
    """Of a loss ``sum_p <A_p, arriving_p>`` by autograd through the chain, at the states that slices leave."""
    made, generator = chain
    shape = len(made), made[0].num_rows, 2, 3, 3
    states, transitions, grads = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    states.requires_grad_()
    arriving = [arriving_states(states, transitions, plan, rank=rank) for rank, plan in enumerate(made)]
    (torch.stack(arriving) + 0 * states).backward(grads)
    for rank, plan in enumerate(made):
        found = leaving_gradients(grads, transitions, plan, rank=rank)
        torch.testing.assert_close(found, states.grad[rank], rtol=1e-12, atol=1e-12)


def whole_batch(num_rows: int, length: int) -> PackedBatch:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        cuts = np.flatnonzero(generator.random(length - 1) < 0.15) + 1
        boundaries = np.concatenate([[0], cuts, [length]])
        rows.append(PackedRow(generator.integers(0, 32, length + 1), boundaries, True))
    return PackedBatch.from_rows(rows, mtp_depths=2)


@pytest.mark.parametrize("recompute", [(), ("norms", "activations", "gdn_prologue"), ("layer",)])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_the_model_over_slices_is_that_over_rows(scope: str, recompute: tuple[RecomputePart, ...]) -> None:
    """All losses, MTP of two depths, both scopes, and every gradient, in fp32; the slices' totals add up."""
    size, batch = 2, whole_batch(2, 24)
    config = small_config(mtp_num_layers=2, router_aux_loss_scope=scope, router_z_loss_coef=0.01)
    scales = scales_of(batch)

    def run(model: Qwen3NextForCausalLM, own: PackedBatch, micro_batches: int) -> dict[str, torch.Tensor]:
        model.recompute = recompute
        (output,) = model([own], replace(scales, num_micro_batches=micro_batches))
        output.total.backward()
        losses = {"total": output.total.detach(), "lm": output.nll_lm_sum, "mtp": output.nll_mtp_sums}
        counts = {"counts": output.expert_counts_LE.float(), "z": output.z_L / micro_batches}
        return {**losses, **counts, **gradients(model)}

    models = [build(config) for _ in range(size)]

    def perform(group: ThreadGroup) -> dict[str, torch.Tensor]:
        model = models[group.rank]
        model.sequence_group = group
        model.reduce_row_counts = group.begin_sum
        model.reduce_counts = group.begin_sum
        halo = config.linear_conv_kernel_dim - 1
        return run(model, batch.cut(RowSlice(group.rank, size, halo)), size)

    expected = run(build(config), batch, 1)
    found = on_ranks(size, perform)
    summed = {name: torch.stack([rank[name] for rank in found]).sum(0) for name in expected}
    assert largest_difference(expected, summed) < 2e-5


def test_a_batch_of_another_rank_is_noticed() -> None:
    plan = plan_slices(cumulated([16]), num_rows=1, part=RowSlice(0, 2, HALO))

    def perform(group: ThreadGroup) -> None:
        if group.rank == 1:
            with pytest.raises(AssertionError, match="the batch is another rank's"):
                sliced(plan, group)

    on_ranks(2, perform)


Spoil = Callable[[SlicePlan], SlicePlan]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda plan: replace(plan, continues=((True,),) * 4), id="a state enters a new document"),
        pytest.param(lambda plan: replace(plan, passes=((True,),) * 4), id="a state passes a document's beginning"),
        pytest.param(lambda plan: replace(plan, convolved=plan.scanned), id="no halo"),
        pytest.param(
            lambda plan: replace(plan, last=tuple((3, stop) for _, stop in plan.last)), id="not the last piece"
        ),
    ],
)
def test_a_wrong_plan_is_noticed(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    """What the comparisons above are worth."""
    monkeypatch.setattr("tests.unit.model.test_sequence_group.plan_slices", partial(_spoiled, spoil))
    assert max(difference("gdn", 1, lengths, 4) for lengths in ([8, 8], [5, 6, 5])) > 1e-6


def _spoiled(spoil: Spoil, *arguments: object, **named: object) -> SlicePlan:
    return spoil(plan_slices_of_the_package(*arguments, **named))  # type: ignore[arg-type]


plan_slices_of_the_package = plan_slices
