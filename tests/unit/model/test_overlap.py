"""Micro-batches that pass through a layer together: the order of their work, and that their sums stay what they are."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.config.schema import RecomputePart
from qwen3next_train.model.overlap import Stages, interleaved
from qwen3next_train.model.qwen3_next import LossScales, ModelOutput
from tests.unit.model.small_models import batch_of, build, small_config

MODEL = small_config(router_z_loss_coef=1e-2, mtp_num_layers=2, router_aux_loss_scope="global")


def _work(name: str, events: list[str], num_yields: int = 1) -> Stages[str]:
    for stage in range(num_yields):
        events.append(f"{name}{stage}")
        yield
    events.append(f"{name}{num_yields}")
    return name


def test_each_is_advanced_to_its_next_exchange_in_turn() -> None:
    events: list[str] = []
    assert interleaved([_work("a", events, 2), _work("b", events, 2)]) == ["a", "b"]
    assert events == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_one_alone_is_run() -> None:
    events: list[str] = []
    assert interleaved([_work("a", events)]) == ["a"]
    assert events == ["a0", "a1"]


def test_works_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 of 2 micro-batches are through a layer"):
        interleaved([_work("a", [], 1), _work("b", [], 2)])


@pytest.mark.parametrize("recompute", [(), ("layer",), ("norms", "activations", "gdn_prologue")])
def test_losses_are_the_same_and_gradients_the_sum(recompute: tuple[RecomputePart, ...]) -> None:
    """Of packed rows of different documents; the load-balancing loss counts the second behind the first."""
    batches = [batch_of([[20, 13], [33]], mtp_depths=2), batch_of([[1, 32], [5, 5, 23]], mtp_depths=2, seed=1)]
    scales = LossScales([sum(b.num_targets[depth] for b in batches) for depth in range(3)], len(batches))
    alone, together = build(MODEL), build(MODEL)
    together.recompute = recompute
    alone.begin_step()
    expected: list[ModelOutput] = []
    for batch in batches:
        expected += alone([batch], scales)
        expected[-1].total.backward()
    together.begin_step()
    found = together(batches, scales)
    torch.stack([output.total for output in found]).sum().backward()
    for output, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(output, wanted, strict=True))
    for (name, parameter), wanted_parameter in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None
        assert wanted_parameter.grad is not None
        # What is used at several depths is summed in another order.
        torch.testing.assert_close(parameter.grad, wanted_parameter.grad, rtol=1e-5, atol=1e-8, msg=name)
