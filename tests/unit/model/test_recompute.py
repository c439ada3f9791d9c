"""Recompute: the same gradients bit for bit, fewer bytes between the passes, nothing expensive done twice."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import ModelConfig, RecomputePart
from qwen3next_train.model.qwen3_next import LossScales, ModelOutput, Qwen3NextForCausalLM
from qwen3next_train.model.recompute import recomputed, recomputed_layer, recomputing
from qwen3next_train.model.router_losses import RouterStats
from tests.unit.model.live_storages import LiveStorages
from tests.unit.model.small_models import batch_of, build, cpu_kernels, scales_of, small_config

PARTS: tuple[RecomputePart, ...] = ("norms", "activations", "gdn_prologue", "layer")
SUBSETS = [subset for size in range(1, 5) for subset in combinations(PARTS, size)]
MODEL = small_config(router_z_loss_coef=1e-2, mtp_num_layers=2, router_aux_loss_scope="global")


def _run(
    recompute: tuple[RecomputePart, ...], batches: list[PackedBatch], *, config: ModelConfig = MODEL
) -> tuple[dict[str, torch.Tensor], list[ModelOutput]]:
    """Gradients of a step of ``batches`` and the outputs, the forward passes all before the backward passes."""
    model = build(config)
    model.recompute = recompute
    scales = LossScales([sum(b.num_targets[depth] for b in batches) for depth in range(3)], len(batches))
    model.begin_step()
    outputs = [model([batch], scales)[0] for batch in batches]
    for output in reversed(outputs):
        output.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}, outputs


def _batches() -> list[PackedBatch]:
    return [batch_of([[20, 13], [33]], mtp_depths=2), batch_of([[1, 32], [5, 5, 23]], mtp_depths=2, seed=1)]


@pytest.fixture(scope="module")
def without() -> tuple[dict[str, torch.Tensor], list[ModelOutput]]:
    """What a step makes that recomputes nothing."""
    return _run((), _batches())


@pytest.mark.parametrize("recompute", SUBSETS, ids="+".join)
def test_gradients_are_bit_equal(
    recompute: tuple[RecomputePart, ...], without: tuple[dict[str, torch.Tensor], list[ModelOutput]]
) -> None:
    """Packed rows, two MTP depths, both router losses, two micro-batches under way at once."""
    expected, expected_outputs = without
    found, outputs = _run(recompute, _batches())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    for output, expected_output in zip(outputs, expected_outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_fields(output), _fields(expected_output), strict=True))


def _fields(output: ModelOutput) -> list[torch.Tensor]:
    return list(output)


@pytest.mark.parametrize("recompute", [PARTS[:3], PARTS], ids="+".join)
def test_gradients_are_bit_equal_in_bf16(recompute: tuple[RecomputePart, ...]) -> None:
    """Casts to and from fp32 are recomputed too."""
    batch = batch_of([[20, 13]], mtp_depths=1)
    gradients = []
    for parts in ((), recompute):
        model = build(small_config(), dtype=torch.bfloat16)
        model.cast_(torch.bfloat16)
        model.recompute = parts
        model([batch], scales_of(batch))[0].total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def _counting_model(recompute: tuple[RecomputePart, ...]) -> tuple[Qwen3NextForCausalLM, Counter[str]]:
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    kernels = cpu_kernels()
    names = ("gated_delta_rule", "varlen_attention", "grouped_matmul", "gdn_prologue", "linear_cross_entropy")
    wrapped = replace(kernels, **{name: counted(name, getattr(kernels, name)) for name in names})
    model = Qwen3NextForCausalLM(MODEL, kernels=wrapped, recompute=recompute)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, calls


@pytest.mark.parametrize(("recompute", "layers_again"), [(PARTS[:3], 0), (("layer",), 1), (PARTS, 1)])
def test_only_whole_layers_do_expensive_work_again(recompute: tuple[RecomputePart, ...], layers_again: int) -> None:
    """One GDN layer, one attention layer and two MTP layers; the head never runs again."""
    model, calls = _counting_model(recompute)
    batch = batch_of([[20, 13]], mtp_depths=2)
    model([batch], scales_of(batch))[0].total.backward()
    passes = 1 + layers_again
    assert calls == {
        "gated_delta_rule": passes,
        "varlen_attention": 3 * passes,
        "grouped_matmul": 8 * passes,
        "gdn_prologue": 2,
        "linear_cross_entropy": 3,
    }


def _bytes_between_passes(recompute: tuple[RecomputePart, ...]) -> tuple[int, int]:
    """Bytes alive after the forward pass, and after the backward pass; parameters and gradients apart."""
    model = build(MODEL)
    model.recompute = recompute
    batch = batch_of([[40, 24]], mtp_depths=2)
    with LiveStorages() as storages:
        total = model([batch], scales_of(batch))[0].total
        between = storages.live_bytes(without=list(model.parameters()))
        total.backward()
        del total
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        after = storages.live_bytes(without=[*model.parameters(), *gradients, *batch.mtp_targets])
    return between, after


def test_every_part_saves_bytes_and_none_is_left_over() -> None:
    """More parts, fewer bytes; whole layers fewest. After the backward pass no recomputed tensor is alive."""
    none, _ = _bytes_between_passes(())
    by_part = {part: _bytes_between_passes((part,))[0] for part in PARTS}
    cheap, left_after_cheap = _bytes_between_passes(PARTS[:3])
    everything, left_after_everything = _bytes_between_passes(PARTS)
    assert max(by_part.values()) < none
    assert everything < by_part["layer"] < cheap < min(by_part[part] for part in PARTS[:3])
    saved_apart = sum(none - by_part[part] for part in PARTS[:3])
    assert none - cheap >= saved_apart, "what one part keeps as a source, another is_recomputed"
    assert max(left_after_cheap, left_after_everything) < 1000, "the expert loads of the step and the batch"


def test_a_layer_runs_again_before_anything_of_it_runs_backward() -> None:
    """Weights that are gathered for a module's backward must not be released by a forward in the middle of it."""
    events = []

    def layer(contexts: Sequence[None], x: torch.Tensor) -> tuple[torch.Tensor, list[RouterStats]]:
        events.append("forward")
        y = x.exp() * x
        if y.requires_grad:
            y.register_hook(lambda _: events.append("backward"))
        return y, []

    x = torch.ones(3, requires_grad=True)
    with recomputing(["layer"]):
        (y,), _ = recomputed_layer(layer, [], x)
    y.sum().backward()
    assert events == ["forward", "forward", "backward"]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((3,), 2 * torch.e))


def test_a_layer_that_runs_again_leaves_no_graph_but_its_inputs() -> None:
    """Nothing else is saved in the forward pass; what the router's statistics carry is as without recompute."""
    saved: list[torch.Tensor] = []

    def layer(contexts: Sequence[None], x: torch.Tensor) -> tuple[torch.Tensor, list[RouterStats]]:
        probability = x.softmax(-1)
        return x.exp().sin(), [RouterStats(probability, x.argmax(-1), x.square().mean(), probability.detach().sum())]

    x = torch.randn(3, 4, requires_grad=True)
    with recomputing(["layer"]), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (y,), (stats,) = recomputed_layer(layer, [], x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
    carries = [t.requires_grad for t in (stats.mean_prob_rE, stats.counts_rE, stats.z, stats.entropy)]
    assert carries == [True, False, True, False]
    weight = torch.randn(3, 4)
    (found,) = torch.autograd.grad(y.sum() + (weight * stats.mean_prob_rE).sum() + stats.z, x)
    plain, (stats,) = layer([], x)
    (expected,) = torch.autograd.grad(plain.sum() + (weight * stats.mean_prob_rE).sum() + stats.z, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("recompute", [("layer",), PARTS], ids="+".join)
def test_layers_behind_a_fixed_embedding_have_their_gradients(recompute: tuple[RecomputePart, ...]) -> None:
    """Nothing that goes into the first layer has a gradient."""
    batch = batch_of([[20, 13]], mtp_depths=2)
    gradients = []
    for parts in ((), recompute):
        model = build(MODEL)
        model.recompute = parts
        model.model.embed_tokens.weight.requires_grad_(False)
        model([batch], scales_of(batch))[0].total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert "model.layers.0.input_layernorm.weight" in expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_an_error_in_the_recomputation_leaves_nothing_alive() -> None:
    """Neither in a cycle, as no garbage is collected within a step, nor for the next pass."""
    inside: list[weakref.ref[torch.UntypedStorage]] = []

    def layer(contexts: Sequence[None], x: torch.Tensor) -> tuple[torch.Tensor, list[RouterStats]]:
        y = x.exp()
        inside.append(weakref.ref(y.untyped_storage()))
        if len(inside) == 2:
            raise ValueError("no room")
        return y.sin(), []

    x = torch.ones(3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with recomputing(["layer"]):
                (y,), _stats = recomputed_layer(layer, [], x)
            if len(inside) == 1:
                with pytest.raises(ValueError, match="no room"):
                    y.sum().backward()
        assert x.grad is None
        y.sum().backward()
        del y
        assert [reference() for reference in inside] == [None] * 4
    finally:
        gc.enable()
    torch.testing.assert_close(x.grad, torch.ones(3).exp() * torch.ones(3).exp().cos())


def test_evaluation_recomputes_nothing() -> None:
    model, calls = _counting_model(PARTS)
    with torch.no_grad():
        batch = batch_of([[20, 13]], mtp_depths=2)
        model([batch], scales_of(batch))[0]
    assert calls["gdn_prologue"] == 1


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.exp().sin()


def test_a_function_runs_once_more_whatever_is_asked_for_how_often() -> None:
    """Two consumers of the output, one of a transposed slice, and the function's own backward."""
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return _wide(x)

    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with recomputing(("norms",)):
        y = recomputed("norms", function, x * 1)
        total = (y @ weight).sum() + (y[1:, 2:].T @ torch.ones(3, 1)).square().sum() + y.square().sum()
    found = torch.autograd.grad(total, (x, weight))
    assert len(calls) == 2
    plain = _wide(x * 1)
    total = (plain @ weight).sum() + (plain[1:, 2:].T @ torch.ones(3, 1)).square().sum() + plain.square().sum()
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(total, (x, weight)), strict=True))


def test_chains_are_rebuilt_from_their_beginning() -> None:
    """A second function's input is the first one's output; neither stays alive."""
    x = torch.randn(3, 3, requires_grad=True)
    with recomputing(("norms", "activations")):
        first = recomputed("norms", _wide, x * 1)
        second = recomputed("activations", lambda a: (a.exp(), a.cos()), first)
        total = second[0].square().sum() + (second[1] @ x).sum()
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in (first, *second)]
    references = [weakref.ref(tensor) for tensor in (first, *second)]
    del first, second
    gc.collect()
    assert all(reference() is None for reference in (*alive, *references))
    (found,) = torch.autograd.grad(total, x)
    plain = _wide(x * 1)
    total = plain.exp().square().sum() + (plain.cos() @ x).sum()
    assert torch.equal(found, torch.autograd.grad(total, x)[0])


def test_an_output_changed_in_place_is_kept_as_it_is() -> None:
    """What would be recomputed is not what the consumer saw."""
    x = torch.randn(5, requires_grad=True)
    with recomputing(("norms",)):
        y = recomputed("norms", lambda a: a * 2, x * 1)
        y += 1
        total = y.square().sum()
    (found,) = torch.autograd.grad(total, x)
    assert torch.equal(found, 2 * (x * 2 + 1).detach() * 2)


def test_an_input_changed_in_place_is_noticed() -> None:
    x = torch.randn(5, requires_grad=True)
    with recomputing(("norms",)):
        source = x * 1
        total = recomputed("norms", _wide, source).square().sum()
        source += 1
    with pytest.raises(AssertionError, match="modified in place"):
        total.backward()


def test_marks_do_nothing_outside_and_within_each_other() -> None:
    """The inner function is done again as a part of the outer one only."""
    calls: Counter[str] = Counter()

    def inner(x: torch.Tensor) -> torch.Tensor:
        calls["inner"] += 1
        return F.silu(x)

    def outer(x: torch.Tensor) -> torch.Tensor:
        calls["outer"] += 1
        return recomputed("norms", inner, x.exp()).exp()

    x = torch.randn(5, requires_grad=True)
    recomputed("norms", outer, x).sum().backward()
    assert calls == {"inner": 1, "outer": 1}
    with recomputing(("norms",)):
        total = recomputed("norms", outer, x).square().sum()
    total.backward()
    assert calls == {"inner": 3, "outer": 3}


def test_an_error_in_the_forward_pass_leaves_nothing_under_way() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    x = torch.randn(5, requires_grad=True)
    with recomputing(("norms",)):
        with pytest.raises(ValueError, match="no"):
            recomputed("norms", fail, x)
        total = recomputed("norms", _wide, x * 1).square().sum()
    total.backward()
    with recomputing(()):
        assert recomputed("norms", _wide, x).requires_grad
