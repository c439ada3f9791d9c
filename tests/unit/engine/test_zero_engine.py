"""The engine on one process: dtypes, clipping, skipping, and the state in and out of ZeRO."""

import gc
from functools import partial
from typing import Any

import pytest
import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import FragmentKind, Report, StepTotals
from qwen3next_train.engine.step_clock import StepClock
from qwen3next_train.model.mtp import MultiTokenPredictor
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches
from tests.distributed.test_layout_equality import small_config

pytestmark = pytest.mark.slow


def _batches(config: Config, step: int) -> tuple[list[PackedBatch], StepTotals]:
    batches = rank_batches(config, Topology(), step, packed=True)
    return batches, StepTotals.over_ranks(batches, list)


def _step(engine, config: Config, step: int):  # type: ignore[no-untyped-def]
    batches, totals = _batches(config, step)
    return engine.train_step(batches, totals=totals, lr=config.optimizer.lr, report=Report.LAYERS)


def _state(engine) -> dict[tuple[str, FragmentKind], torch.Tensor]:  # type: ignore[no-untyped-def]
    return {(f.name, kind): tensor.clone() for f in engine.fragments() for kind, tensor in f.tensors.items()}


def _read(
    state: dict[tuple[str, FragmentKind], torch.Tensor], name: str, kind: FragmentKind, start: int, stop: int
) -> torch.Tensor:
    return state[name, kind][start:stop]


def _bf16(*, zero_stage: int, offload: str = "none", clip_grad: float = 0.0) -> Config:
    """Two micro-batches a step."""
    values = small_config(micro_batch_size=1, clip_grad=clip_grad).model_dump()
    values["run"] |= {"precision": "bf16", "global_batch_size": 2}
    values["parallel"] |= {"zero_stage": zero_stage, "offload_optimizer": offload}
    return Config.model_validate(values)


def test_bf16_run_keeps_the_table_s_fp32_parameters_in_fp32_through_a_step(context: ProcessContext) -> None:
    config = small_config(micro_batch_size=4)
    config = config.model_copy(update={"run": config.run.model_copy(update={"precision": "bf16"})})
    engine = build_engine(config, context)
    _step(engine, config, 0)
    parameters = dict(engine._model.named_parameters())
    for spec in parameter_table(config.model):
        expected = torch.float32 if spec.fp32 else torch.bfloat16
        assert parameters[spec.name].dtype == expected, spec.name
    for fragment in engine.fragments():
        assert all(tensor.dtype == torch.float32 for tensor in fragment.tensors.values()), fragment.name
        stored = parameters[fragment.name].detach().float().flatten()
        rounded = fragment.tensors["master"].to(parameters[fragment.name].dtype).float()
        assert torch.equal(stored, rounded), fragment.name


def test_clipping_divides_the_gradient_by_its_true_norm(context: ProcessContext) -> None:
    free, clipped = small_config(micro_batch_size=4), small_config(micro_batch_size=4, clip_grad=1e-3)
    states = []
    for config in (free, clipped):
        engine = build_engine(config, context)
        norm = _step(engine, config, 0).metrics["optim/grad_norm"]
        states.append({key: tensor for key, tensor in _state(engine).items() if key[1] == "exp_avg"})
    # After one step exp_avg is 0.1 g: its norm over all parameters is the norm that was reported.
    total = torch.sqrt(sum(tensor.square().sum() for tensor in states[0].values())) / 0.1
    assert float(total) == pytest.approx(norm, rel=1e-5)
    clipped_total = torch.sqrt(sum(tensor.square().sum() for tensor in states[1].values())) / 0.1
    assert float(clipped_total) == pytest.approx(1e-3, rel=1e-4)


def test_a_non_finite_gradient_skips_the_update_and_leaves_the_state_bit_equal(context: ProcessContext) -> None:
    config = small_config(micro_batch_size=4)
    engine = build_engine(config, context)
    _step(engine, config, 0)
    before = _state(engine)
    poisoned = engine._model.model.norm.weight
    handle = poisoned.register_hook(lambda grad: grad * float("nan"))
    result = _step(engine, config, 1)
    handle.remove()
    assert result.skipped
    after = _state(engine)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not _step(engine, config, 2).skipped


def test_a_step_in_bf16_asks_once_whether_it_is_finite(
    context: ProcessContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question waits for the device; DeepSpeed asks again to clip, once for each optimizer group."""
    from deepspeed.runtime.zero import stage_1_and_2

    config = _bf16(zero_stage=2, offload="cpu", clip_grad=0.5)
    engine = build_engine(config, context)
    original, norms = stage_1_and_2.is_invalid_grad_norm, []

    def noted(norm: torch.Tensor) -> bool:
        norms.append(float(norm))
        return original(norm)

    monkeypatch.setattr(stage_1_and_2, "is_invalid_grad_norm", noted)
    result = _step(engine, config, 0)
    assert norms == [result.metrics["optim/grad_norm"]]


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "cpu"), (2, "cpu")])
def test_no_gradient_is_rounded_on_its_way_in_bf16(
    context: ProcessContext, zero_stage: int, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of fp32 parameters have more digits than bf16, which stage 1 keeps; so have the sums of micro-batches."""
    with monkeypatch.context() as patch:
        # The buckets' gradients of matrices are not even rounded where they are made.
        patch.setattr(Layout, "sums_in_buckets", False)
        expected = _first_moments(_bf16(zero_stage=1), context)
    config = _bf16(zero_stage=zero_stage, offload=offload)
    found = _first_moments(config, context)
    for spec in parameter_table(config.model):
        assert torch.equal(found[spec.name], expected[spec.name]), spec.name


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_sums_in_place_round_no_gradient_of_an_fp32_parameter(
    context: ProcessContext, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _first_moments(_bf16(zero_stage=zero_stage), context)
    monkeypatch.setattr(Layout, "sums_in_buckets", False)
    expected = _first_moments(_bf16(zero_stage=1), context)
    fp32 = [spec.name for spec in parameter_table(_bf16(zero_stage=1).model) if spec.fp32]
    assert len(fp32) > 4
    for name in fp32:
        assert torch.equal(found[name], expected[name]), name
    # A bf16 gradient is off by up to 2^-9 of itself.
    for name, moment in expected.items():
        assert float((found[name] - moment).norm()) <= 2**-8 * float(moment.norm()), name


def _first_moments(config: Config, context: ProcessContext) -> dict[str, torch.Tensor]:
    """A tenth of the first step's gradients."""
    engine = build_engine(config, context)
    _step(engine, config, 0)
    return {name: tensor for (name, kind), tensor in _state(engine).items() if kind == "exp_avg"}


def test_state_read_back_into_a_fresh_engine_goes_on_bit_for_bit(context: ProcessContext) -> None:
    config = small_config(micro_batch_size=2, clip_grad=0.5)
    engine = build_engine(config, context)
    for step in range(2):
        _step(engine, config, step)
    saved = _state(engine)
    expected = [_step(engine, config, step).metrics for step in (2, 3)]

    def read(name: str, kind: FragmentKind, start: int, stop: int) -> torch.Tensor:
        return saved[name, kind][start:stop]

    other = build_engine(config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})}), context)
    other.load_state(read, 2)
    assert [_step(other, config, step).metrics for step in (2, 3)] == expected


def test_eval_loss_is_the_training_loss_of_the_same_rows(context: ProcessContext) -> None:
    config = small_config(micro_batch_size=4)
    engine = build_engine(config, context)
    batches, totals = _batches(config, 0)
    loss, count = engine.eval_loss(batches)
    assert count == totals.num_targets[0]
    assert loss == pytest.approx(_step(engine, config, 0).metrics["loss/lm"], rel=1e-6)


@pytest.mark.parametrize(("zero_stage", "in_flight"), [(1, 1), (1, 2), (3, 1)])
def test_loss_by_source_and_position_leaves_the_curve_bit_equal(
    context: ProcessContext, zero_stage: int, in_flight: int
) -> None:
    results = []
    for groupings in ([], ["source", "position"]):
        values = small_config(micro_batch_size=1).model_dump()
        values["run"]["global_batch_size"] = 3
        values["parallel"] |= {"zero_stage": zero_stage, "micro_batches_in_flight": in_flight}
        values["data"]["sources"] = [{"source": name} for name in ("a", "b", "c")]
        values["logging"]["loss_by"] = groupings
        config = Config.model_validate(values)
        engine = build_engine(config, context)
        results.append(([_step(engine, config, step).metrics for step in range(2)], _state(engine)))
    (plain, state), (grouped, grouped_state) = results
    assert all(torch.equal(state[key], grouped_state[key]) for key in state)
    for step, (expected, found) in enumerate(zip(plain, grouped, strict=True)):
        assert {name: found[name] for name in expected} == expected
        assert found.keys() - expected.keys() == {
            *(f"loss/{name}" for name in "abc"),
            *(f"data/share_{name}" for name in "abc"),
            *("loss/position_0", "loss/position_16"),
        }
        batches, _ = _batches(config, step)
        targets = [0] * 3
        for batch in batches:
            targets[batch.sources[0]] += batch.num_targets[0]
        mean = sum(found[f"loss/{name}"] * count for name, count in zip("abc", targets, strict=True)) / sum(targets)
        assert mean == pytest.approx(expected["loss/lm"], rel=1e-6)


def test_parameters_whose_first_gradient_comes_in_the_last_backward_pass(
    context: ProcessContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their buckets wait for them in vain in the passes before, and are reduced at the end of each under stage 2."""
    original = MultiTokenPredictor.forward
    norms = {}
    for zero_stage in (1, 2):
        values = small_config(micro_batch_size=1).model_dump()
        values["model"]["mtp_num_layers"] = 1
        values["parallel"]["zero_stage"] = zero_stage
        config = Config.model_validate(values)
        calls = iter(range(100))

        def without_gradient_at_first(self, *args, calls=calls):  # type: ignore[no-untyped-def]
            outputs, stats = original(self, *args)
            is_early = next(calls) < 3
            return [output.detach() if is_early else output for output in outputs], stats

        monkeypatch.setattr(MultiTokenPredictor, "forward", without_gradient_at_first)
        engine = build_engine(config, context)
        assert len(_batches(config, 0)[0]) == 4
        norms[zero_stage] = _step(engine, config, 0).metrics["optim/grad_norm"]
    assert norms[1] == pytest.approx(norms[2], rel=1e-6)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "none"), (1, "cpu"), (2, "none"), (3, "none")])
def test_steps_may_have_different_numbers_of_micro_batches(
    context: ProcessContext, zero_stage: int, offload: str
) -> None:
    """Steps of one, two and three micro-batches; each is the step of the engine that is built for its number."""
    values = small_config(micro_batch_size=1).model_dump()
    values["parallel"] |= {"zero_stage": zero_stage, "offload_optimizer": offload}
    config = Config.model_validate(values)

    def trained(engines: list[Any]) -> dict[tuple[str, FragmentKind], torch.Tensor]:
        state: dict[tuple[str, FragmentKind], torch.Tensor] = {}
        for step, (engine, count) in enumerate(zip(engines, (1, 2, 3), strict=True)):
            if state:
                engine.load_state(partial(_read, state), step)
            batches = _batches(config, step)[0][:count]
            totals = StepTotals.over_ranks(batches, list)
            assert not engine.train_step(batches, totals=totals, lr=1e-3, report=Report.NONE).skipped
            state = _state(engine)
        return state

    def of(num_micro_batches: int) -> Any:
        run = config.run.model_copy(update={"global_batch_size": num_micro_batches})
        return build_engine(config.model_copy(update={"run": run}), context)

    varying = of(3)
    found, expected = trained([varying] * 3), trained([of(1), of(2), of(3)])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_nothing_is_collected_within_a_step_and_nothing_needs_to_be(context: ProcessContext, zero_stage: int) -> None:
    """The collector would stop one rank where others wait for it; a tensor in a cycle would be held until then."""
    values = _bf16(zero_stage=zero_stage, clip_grad=1.0).model_dump()
    values["parallel"]["recompute"] = ["layer"]
    config = Config.model_validate(values)
    engine = build_engine(config, context)
    _step(engine, config, 0)
    batches, totals = _batches(config, 1)
    collects: list[bool] = []
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        engine.train_step(
            batches,
            totals=totals,
            lr=1e-3,
            report=Report.LAYERS,
            before_update=lambda: collects.append(gc.isenabled()),
        )
        collects.append(gc.isenabled())
        gc.collect()
        found = [garbage for garbage in gc.garbage if isinstance(garbage, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert collects == [False, True]
    assert found == []


def test_times_of_the_parts_are_of_reported_steps_and_change_nothing(context: ProcessContext) -> None:
    config = small_config(micro_batch_size=1)
    plain, timed = build_engine(config, context), build_engine(config, context, clock=StepClock(context.device))
    batches, totals = _batches(config, 0)
    parts = {"perf/forward_s", "perf/backward_s", "perf/optimizer_s"}
    for report in (Report.SUMMARY, Report.NONE):
        results = [
            engine.train_step(batches, totals=totals, lr=1e-3, report=report).metrics for engine in (plain, timed)
        ]
        assert set(results[1]) - set(results[0]) == (parts if report is Report.SUMMARY else set())
        assert all(results[1][name] == value for name, value in results[0].items())
        assert all(results[1][name] > 0 for name in parts & set(results[1]))
