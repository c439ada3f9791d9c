"""ZeRO-3 sums gradients of weights that nobody shares where they are updated, and others over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import Config
from qwen3next_train.engine import deepspeed_config, partitioned_parameters
from qwen3next_train.engine.base import FragmentKind
from qwen3next_train.engine.clipped_update import ClippedUpdate
from qwen3next_train.engine.partitioned_parameters import PartitionedParameterOptimizer, begin_sum_to_owners
from qwen3next_train.kernels.adamw import adamw_update_reference
from qwen3next_train.optim.adamw import OnePassAdamW
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.parameters import parameter_table
from tests.distributed.engine import build_engine
from tests.distributed.test_layout_equality import small_config
from tests.unit.engine.test_zero_engine import _first_moments, _state, _step

State = dict[tuple[str, FragmentKind], torch.Tensor]


def _config(
    zero_stage: int, *, recompute: tuple[str, ...] = (), clip_grad: float = 0.0, precision: str = "fp32"
) -> Config:
    """Four micro-batches a step, and embedding and head twice in each."""
    values = small_config(micro_batch_size=1, clip_grad=clip_grad).model_dump()
    values["model"]["mtp_num_layers"] = 1
    values["run"]["precision"] = precision
    values["parallel"] |= {"zero_stage": zero_stage, "recompute": list(recompute)}
    return Config.model_validate(values)


def _assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [(), ("layer",)])
def test_one_rank_has_the_bits_of_zero_1(
    context: ProcessContext, recompute: tuple[str, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, in none of which DeepSpeed handles a gradient or asks whether the norm is finite."""
    states = []
    for zero_stage in (1, 3):
        config = _config(zero_stage, recompute=recompute, precision=precision)
        engine = build_engine(config, context)
        if zero_stage == 3:
            for name in ("__add_grad_to_ipg_bucket", "__reduce_and_partition_ipg_grads", "get_grad_norm_direct"):
                private = f"_DeepSpeedZeroOptimizer_Stage3{name}" if name.startswith("__") else name
                original = getattr(engine._zero, private)
                # At the end of a pass DeepSpeed empties its buckets, which are empty.
                monkeypatch.setattr(engine._zero, private, _only_without_parameters(engine._zero, original))
            monkeypatch.setattr(stage3, "is_invalid_grad_norm", lambda norm: pytest.fail("asked for the norm"))
        for step in range(2):
            assert not _step(engine, config, step).skipped
            assert all(parameter.grad is None for parameter in engine._model.parameters())
        states.append(_state(engine))
    _assert_equal(states[1], states[0])


def test_own_experts_begin_where_16_bytes_can_be_read_at_once(context: ProcessContext) -> None:
    """Behind the weights of two norms, of two elements each; as a rank's share of them is on many ranks."""
    values = _config(3, precision="bf16").model_dump()
    values["model"] |= {"mtp_num_layers": 0, "head_dim": 2, "partial_rotary_factor": 1.0}
    engine = build_engine(Config.model_validate(values), context)
    experts: list[Any] = [weight for name, weight in engine._model.named_parameters() if ".experts." in name]
    assert len(experts) == 4
    assert [weight.ds_tensor.data_ptr() % 16 for weight in experts] == [0] * 4
    groups = engine._zero.fp16_partitioned_groups
    flat = engine._zero.fp16_partitioned_groups_flat
    # Each group is still one piece, which the update writes.
    for partitions, whole in zip(groups, flat, strict=True):
        assert [part.data_ptr() for part in partitions] == [
            whole.data_ptr() + whole.element_size() * sum(part.numel() for part in partitions[:index])
            for index in range(len(partitions))
        ]


@pytest.mark.slow
@pytest.mark.parametrize("bucket_numel", [1, 5000])
def test_shared_gradients_are_summed_beside_the_passes_and_unrounded(
    context: ProcessContext, bucket_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more under way than a bucket holds, or the largest weight; nothing behind the update.

    Those of fp32 parameters have more digits than bf16, and so have the sums of micro-batches.
    """
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "sums_in_buckets", False)
        expected = _first_moments(_config(1, precision="bf16"), context)
    monkeypatch.setattr(PartitionedParameterOptimizer, "_get_param_partition_world_size", lambda *_: 2)
    monkeypatch.setattr(deepspeed_config, "REDUCE_BUCKET_NUMEL", bucket_numel)
    begin, under_way, most = partitioned_parameters.begin_sum_to_owners, [], []

    def noted(gradients: list[torch.Tensor], *args: Any, **settings: Any) -> Any:
        begun = [gradient.numel() for gradient in gradients]
        under_way.append(sum(begun))
        most.append(list(under_way))
        receive = begin(gradients, *args, **settings)

        def received() -> list[torch.Tensor]:
            assert under_way.pop(0) == sum(begun), "not in their order"
            return receive()

        return received

    monkeypatch.setattr(partitioned_parameters, "begin_sum_to_owners", noted)
    config = _config(3, precision="bf16")
    found = _first_moments(config, context)
    assert under_way == []
    largest = max(spec.numel for spec in parameter_table(config.model))
    assert max(map(len, most)) > 1
    assert max(map(sum, most)) <= max(largest, bucket_numel)
    for name, moment in expected.items():
        assert torch.equal(found[name], moment), name


def _only_without_parameters(zero: Any, original: Any) -> Any:
    def checked(*args: Any) -> Any:
        assert not any(isinstance(arg, torch.nn.Parameter) for arg in args)
        assert not any(bucket.params for bucket in zero.ipg_buckets.values())
        return original(*args)

    return checked


@pytest.mark.slow
def test_leaf_modules_make_no_gradient_in_place_of_one_that_is_summed_already(
    context: ProcessContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's hook would put zeros, as large as all of a layer's weights, where a parameter has no gradient."""
    config = _config(3)
    engine = build_engine(config, context)
    monkeypatch.setattr(
        stage3, "torch", SimpleNamespace(**{**vars(torch), "zeros_like": lambda _: pytest.fail("zeros")})
    )
    _step(engine, config, 0)
    assert [len(parameters) for parameters in engine._zero.leaf_parameters.values()] == [0] * (
        config.model.num_hidden_layers + 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.experts.down_proj"])
def test_a_parameter_without_a_gradient_in_a_step_keeps_none_of_the_step_before(
    context: ProcessContext, name: str
) -> None:
    results = []
    for zero_stage in (1, 3):
        config = _config(zero_stage)
        engine = build_engine(config, context)
        parameter = dict(engine._model.named_parameters())[name]
        norms = []
        for step, requires_grad in enumerate((True, False)):
            parameter.requires_grad_(requires_grad)
            norms.append(_step(engine, config, step).metrics["optim/grad_norm"])
        results.append((norms, _state(engine)))
    (expected_norms, expected), (norms, found) = results
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    _assert_equal(found, expected)


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@contextmanager
def _as_rank(rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of ranks which all have the same gradients."""

    def reduce_scatter(received: torch.Tensor, sent: torch.Tensor, group: object, async_op: bool) -> SimpleNamespace:
        assert async_op
        return SimpleNamespace(wait=lambda: received.copy_(num_ranks * sent.view(num_ranks, -1)[rank]))

    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda group: num_ranks)
        patch.setattr(dist, "get_rank", lambda group: rank)
        patch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
        yield


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_every_rank_receives_its_part_of_the_sums(
    context: ProcessContext, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that the ranks divide and that they do not; of the last ones some have nothing."""
    gradients = [torch.arange(1.0, 1 + numel).bfloat16() for numel in (24, 5, 1, 10)]
    received: list[list[torch.Tensor]] = []
    for rank in range(num_ranks):
        with _as_rank(rank, num_ranks, monkeypatch):
            begin = begin_sum_to_owners([g.view(1, -1) for g in gradients], _world(), dtype=torch.float32)
            received.append(begin())
    for gradient, parts in zip(gradients, zip(*received, strict=True), strict=True):
        size = -(-gradient.numel() // num_ranks)
        assert all(part.numel() == size for part in parts[: gradient.numel() // size])
        assert torch.cat(parts).tolist() == (num_ranks * gradient.float()).tolist()


def _optimizer(gradient: torch.Tensor) -> tuple[OnePassAdamW, torch.Tensor]:
    weight = torch.ones_like(gradient)
    optimizer = OnePassAdamW(
        [{"params": [weight]}],
        lr=0.1,
        betas=(0.9, 0.9),
        eps=1e-8,
        moments_dtype=torch.float32,
        update=adamw_update_reference,
    )
    optimizer.gradients[weight] = gradient
    return optimizer, weight


def test_an_update_clips_to_the_norm(context: ProcessContext) -> None:
    optimizer, weight = _optimizer(torch.tensor([3.0, 4.0]))
    update = ClippedUpdate(optimizer, 1.0, _world())
    assert float(update.run()) == 5.0
    assert update.outcome() == (5.0, False)
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.06, 0.08])


def test_an_update_that_is_not_finite_changes_nothing(context: ProcessContext) -> None:
    optimizer, weight = _optimizer(torch.tensor([3.0, math.nan]))
    update = ClippedUpdate(optimizer, 0.0, _world())
    assert float(update.run()) == math.inf
    assert update.outcome() == (math.inf, True)
    assert weight.tolist() == [1.0, 1.0]
    assert optimizer.state[weight]["step"] == 0
