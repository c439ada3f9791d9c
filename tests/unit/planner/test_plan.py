"""The numbers of a plan and the changes it proposes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
)
from qwen3next_train.config.validate import validate, validate_for_world
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import MAX_FASTEST, USABLE_FRACTION, changed_fields
from qwen3next_train.planner.plan import TIME_ERROR, make_plan
from qwen3next_train.planner.report import format_plan
from tests.unit.accounting.shapes import TINY
from tests.unit.planner.configs import config_80b, config_of, planned, planned_alone


def test_step_and_time() -> None:
    """At a stated MFU step time is FLOPs over peak x MFU; tokens round up to whole steps."""
    plan = make_plan(config_80b(), gpus=64, gpu="h100", mfu=0.4, tokens=1e12)
    assert plan.workload.num_tokens == 256 * 4096
    assert plan.workload.flops_per_step == 26_673_409_060_503_552
    assert plan.workload.flops_per_token == 25_437_745_152
    assert plan.workload.flops_megatron == 2.629781417046835e16
    assert plan.step_time_s == pytest.approx(26_673_409_060_503_552 / (64 * 989.4e12 * 0.4))
    assert plan.mfu == pytest.approx(0.4)
    assert plan.num_steps == 953_675
    assert plan.days == pytest.approx(953_675 * 1.05307 / 86_400, rel=1e-4)
    assert plan.checkpoint_bytes == 12 * 81_324_862_720


def test_defaults_are_run_steps_and_the_table_of_rates() -> None:
    """What nobody stated is the run's own length and the sum of the step's parts."""
    plan = planned(config_80b(steps=77), gpus=64, gpu="h100")
    assert plan.num_steps == 77
    assert plan.step is not None
    assert plan.step_time_s == sum(plan.step.by_part().values())
    assert plan.mfu == pytest.approx(26_673_409_060_503_552 / (64 * 989.4e12 * plan.step.total_s))
    assert plan.step_is_estimate is False
    assert planned(config_80b(), gpus=64, gpu="b200").step_is_estimate is True


def test_a_growing_batch_takes_fewer_tokens_and_more_steps() -> None:
    """From 64 rows by 64 to 256 over 192 samples: one step of 64, one of 128, then 256."""
    schedule = ScheduleConfig(rampup_batch_size=[64, 64, 192], warmup_steps=0)
    config = config_80b(steps=10).model_copy(update={"schedule": schedule})
    plan = make_plan(config, gpus=64, gpu="h100", mfu=0.4, tokens=None)
    assert (plan.num_steps, plan.num_tokens) == (10, (64 + 128 + 8 * 256) * 4096)
    assert plan.days == pytest.approx(2240 / 256 * 1.05307 / 86_400, rel=1e-4)
    plan = make_plan(config, gpus=64, gpu="h100", mfu=0.4, tokens=449 * 4096)
    assert (plan.num_steps, plan.num_tokens) == (4, 704 * 4096)


def test_fp32_runs_have_the_fp32_peak() -> None:
    """A bf16 peak would make an fp32 run look 15 times too fast."""
    config = Config(model=TINY, run=RunConfig(precision="fp32", global_batch_size=4))
    plan = make_plan(config, gpus=1, gpu="h100", mfu=0.5, tokens=None)
    assert plan.step_time_s == pytest.approx(plan.workload.flops_per_step / (66.9e12 * 0.5))
    assert plan.step_is_estimate is True


def test_unknown_device_is_not_judged() -> None:
    """No fit, no times, no faster layouts; the rest stands."""
    plan = make_plan(config_80b(), gpus=64, gpu="NVIDIA RTX Something", mfu=0.3, tokens=1e12)
    assert plan.device is None
    assert plan.fits is None
    assert plan.step_time_s is None
    assert plan.days is None
    assert plan.step is None
    assert plan.mfu is None
    assert plan.recommended is None
    assert plan.memory_bytes > 0


@pytest.mark.parametrize(
    ("gpus", "gpu", "sequence_length", "micro_batch_size"),
    [(8, "h200", 4096, 1), (64, "h100", 1024, 4), (64, "h100", 4096, 1), (16, "b200", 4096, 2), (8, "a100-80", 64, 1)],
)
def test_proposed_changes_fit(gpus: int, gpu: str, sequence_length: int, micro_batch_size: int) -> None:
    """Every proposal, planned for itself, is a valid layout that fits."""
    config = config_80b(sequence_length=sequence_length, micro_batch_size=micro_batch_size)
    plan = planned(config, gpus=gpus, gpu=gpu)
    assert plan.fits is False
    assert plan.changes
    assert plan.layout not in plan.changes
    for layout in plan.changes:
        proposed = planned_alone(config_of(layout), gpus=layout.world_size, gpu=gpu)
        assert proposed.fits


def test_what_costs_least_comes_first() -> None:
    """Offload after everything else, then bf16 moments; and none that changes more than a better one for nothing."""
    config = config_80b(sequence_length=1024)
    for gpus in (16, 32, 64):
        plan = planned(config, gpus=gpus, gpu="h100")
        # The same number of GPUs first.
        assert plan.changes[0].world_size == gpus
        same = [layout for layout in plan.changes if layout.world_size == gpus]
        keys = [(layout.offload_optimizer, layout.moments_dtype == "bf16") for layout in same]
        assert keys == sorted(keys)
        settings = [changed_fields(plan.layout, layout) for layout in plan.changes]
        for worse, changes in enumerate(settings):
            assert not any(better <= changes for better in settings[:worse])


def test_more_gpus_are_named_beside_an_offloaded_optimizer() -> None:
    """8 H200 hold the 80B only with its optimizer in host memory; 16 hold it without."""
    plan = planned(config_80b(), gpus=8, gpu="h200")
    offloaded, *others = plan.changes
    assert (offloaded.world_size, offloaded.offload_optimizer) == (8, True)
    assert others
    assert all(layout.world_size == 16 and not layout.offload_optimizer for layout in others)


def test_hopeless_layouts_have_no_changes() -> None:
    """80 B parameters never fit one small GPU, nor any number that divides the batch of 1."""
    config = config_80b(global_batch_size=1, expert_parallel_size=1)
    plan = planned(config, gpus=1, gpu="rtx3090")
    assert plan.fits is False
    assert plan.changes == ()


def test_fit_leaves_a_margin() -> None:
    """A plan may not fill the last twentieth of the memory."""
    plan = planned(config_80b(zero_stage=3, expert_parallel_size=8), gpus=64, gpu="b200")
    assert plan.device is not None
    assert plan.fits == (plan.memory_bytes <= USABLE_FRACTION * plan.device.memory_bytes)
    assert plan.fits is True


def test_long_rows_are_proposed_to_be_shared_before_they_are_shortened() -> None:
    config = config_80b(sequence_length=131_072, zero_stage=2, recompute=("layer",), global_batch_size=16)
    plan = planned(config, gpus=16, gpu="h200")
    assert plan.fits is False
    best = plan.changes[0]
    assert (best.world_size, best.sequence_length) == (16, 131_072)
    assert best.context_parallel_size > 1
    for layout in plan.changes:
        proposed = planned_alone(config_of(layout), gpus=layout.world_size, gpu="h200")
        assert proposed.memory_bytes > 0


def test_heads_are_proposed_to_be_divided_too() -> None:
    """Each layout with divided heads, planned for itself, is accepted and takes what it is listed with."""
    config = config_80b(sequence_length=131_072, expert_parallel_size=16, global_batch_size=16)
    plan = planned(config, gpus=16, gpu="h200")
    divided = [each for each in plan.fastest if each.layout.tensor_parallel_size > 1]
    assert divided
    for each in divided:
        own = planned_alone(config_of(each.layout, global_batch_size=16), gpus=16, gpu="h200")
        assert own.layout == each.layout
        assert own.fits is True
        assert (own.step, own.memory_bytes) == (each.step, each.memory_bytes)


@pytest.mark.parametrize(
    ("gpus", "context_parallel_size", "rampup"),
    [(64, 1, [64, 64, 1000]), (64, 4, [16, 16, 1000]), (16, 1, [16, 16, 1000])],
)
def test_batches_of_a_ramp_up_divide_too(gpus: int, context_parallel_size: int, rampup: list[int]) -> None:
    """Micro-batches that only the last batch is a multiple of would be rejected; of these, all are of one row."""
    config = config_80b(context_parallel_size=context_parallel_size)
    schedule = ScheduleConfig(rampup_batch_size=rampup)
    plan = planned(config.model_copy(update={"schedule": schedule}), gpus=gpus, gpu="h100")
    assert plan.changes
    proposed = [*plan.changes, *(each.layout for each in plan.fastest)]
    assert {layout.micro_batch_size for layout in proposed} == {1}
    for layout in proposed:
        validate_for_world(config_of(layout, rampup=rampup), layout.world_size)


def test_bf16_gradients_are_given_up_where_they_are_refused() -> None:
    """Only buckets can be of bf16: stage 3 and an offloaded optimizer are proposed with fp32 gradients."""
    config = config_80b()
    parallel = config.parallel.model_copy(update={"gradient_dtype": "bf16"})
    config = config.model_copy(update={"parallel": parallel})
    few = planned(config, gpus=16, gpu="h100")
    refused = [layout for layout in few.changes if layout.zero_stage == 3 or layout.offload_optimizer]
    assert {layout.gradient_dtype for layout in refused} == {"fp32"}
    assert "parallel.gradient_dtype fp32" in format_plan(few)
    assert "no layout fits 16 h100 with bf16 gradients and without an offloaded optimizer" in format_plan(few)
    more = planned(config, gpus=64, gpu="h100")
    assert {(each.layout.zero_stage, each.layout.gradient_dtype) for each in more.fastest} == {(1, "bf16"), (2, "bf16")}
    for layout in (*few.changes, *more.changes):
        assert validate(config_of(layout)) == []


@pytest.mark.parametrize("gpus", [32, 64, 256])
def test_80b_on_h100_needs_recompute(gpus: int) -> None:
    """EP 8 under ZeRO-1 keeps 49 GB of fp32 gradients; what is proposed keeps eight experts a rank and its rows."""
    plan = planned(config_80b(), gpus=gpus, gpu="h100")
    assert plan.fits is False
    assert not any(view.fits for view in plan.recompute)
    assert len(plan.changes) == 3
    for layout in plan.changes:
        assert (layout.world_size, layout.sequence_length) == (gpus, 4096)
        assert not layout.offload_optimizer
        assert layout.moments_dtype == "fp32"
        assert 512 // layout.expert_parallel_size >= 8


def test_recompute_takes_less_memory_and_a_forward_pass_of_the_layers() -> None:
    """The same weights, gradients and logits; a third more work, but for the heads and MTP's projection."""
    plan = planned(config_80b(zero_stage=2), gpus=64, gpu="h100")
    assert [view.recompute for view in plan.recompute] == [
        ("norms",),
        ("activations",),
        ("gdn_prologue",),
        ("norms", "activations", "gdn_prologue"),
        ("layer",),
    ]
    *_, cheap, full = plan.recompute
    totals = [sum(parts.values()) for parts in (full.memory_by_part, cheap.memory_by_part, plan.memory_by_part)]
    assert totals == sorted(totals)
    for view in plan.recompute:
        for part in ("weights", "gradients", "optimizer", "zero_buffers", "logits", "all_to_all", "runtime"):
            assert view.memory_by_part[part] == plan.memory_by_part[part]
    flops = plan.workload.flops_by_part
    outside = flops["head"] + flops["mtp_head"] + flops["mtp_fc"]
    assert full.extra_work == pytest.approx((1 - outside / plan.workload.flops_per_step) / 3)
    assert 0 < cheap.extra_work < 1e-3
    assert full.fits is True


def test_recompute_that_is_set_is_planned_with() -> None:
    """Memory and the time of doing it again; nothing is left to propose."""
    without = planned(config_80b(), gpus=64, gpu="h100")
    plan = planned(config_80b(recompute=["layer"]), gpus=64, gpu="h100")
    assert plan.memory_by_part == without.recompute[-1].memory_by_part
    assert plan.recompute == ()
    assert plan.step is not None
    assert without.step is not None
    assert plan.step.recompute_s > without.step.recompute_s == 0
    assert plan.step.exchange_s > without.step.exchange_s
    some = planned(config_80b(recompute=["norms"]), gpus=64, gpu="h100")
    assert [view.recompute for view in some.recompute] == [
        ("norms", "activations"),
        ("norms", "gdn_prologue"),
        ("norms", "activations", "gdn_prologue"),
        ("layer",),
    ]


def test_bf16_moments_are_not_proposed_where_they_are_refused() -> None:
    """A second moment of beta2 0.999 would stand still."""
    for beta2, proposed in ((0.95, True), (0.999, False)):
        config = config_80b(zero_stage=2, recompute=["layer"], micro_batch_size=4)
        config = config.model_copy(update={"optimizer": OptimizerConfig(beta2=beta2)})
        plan = planned(config, gpus=8, gpu="b200")
        assert any(layout.moments_dtype == "bf16" for layout in plan.changes) is proposed


def test_an_offloaded_optimizer_costs_time_and_host_memory() -> None:
    """Of 8 GPUs each holds 10 B elements' state: 18 bytes of it, read and written."""
    config = config_of(replace(Layout.of(config_80b(), 8), offload_optimizer=True))
    plan = planned(config, gpus=8, gpu="h200")
    assert plan.memory_by_part["optimizer"] == 0
    assert plan.host_bytes == pytest.approx(18 * 81.3e9 / 8, rel=0.02)
    assert plan.step is not None
    assert plan.step.host_s == pytest.approx(2 * plan.host_bytes / 30e9)
    assert "of host memory for each GPU's optimizer" in format_plan(plan)


def test_the_copy_from_which_checkpoints_are_written_is_counted_unless_training_waits_for_saves() -> None:
    plan = planned(config_80b(), gpus=64, gpu="h200")
    assert plan.snapshot_bytes == pytest.approx(12 * 81.3e9 / 64, rel=0.02)
    assert "; 15.25 GB of host memory for each GPU, to save beside training" in format_plan(plan)
    waits = config_80b().model_copy(update={"checkpoint": CheckpointConfig(async_save=False)})
    plan = planned(waits, gpus=64, gpu="h200")
    assert plan.snapshot_bytes == 0
    assert "to save beside training" not in format_plan(plan)


def test_fastest_layouts_are_sorted_fit_and_train() -> None:
    """Each of at most five, planned for itself, is accepted, fits, and takes the time and memory it is listed with."""
    plan = planned(config_80b(global_batch_size=1024), gpus=64, gpu="h200")
    assert 1 < len(plan.fastest) <= MAX_FASTEST
    times = [each.step.total_s for each in plan.fastest]
    assert times == sorted(times)
    for each in plan.fastest:
        config = config_of(each.layout, global_batch_size=1024)
        own = planned_alone(config, gpus=64, gpu="h200")
        assert own.layout == each.layout
        assert own.fits is True
        assert (own.step, own.memory_bytes) == (each.step, each.memory_bytes)
    keys = [
        (each.layout.expert_parallel_size, each.layout.zero_stage, each.layout.micro_batches_in_flight)
        for each in plan.fastest
    ]
    assert len(set(keys)) == len(keys)
    assert {in_flight for *_, in_flight in keys} == {1, 2}


@pytest.mark.parametrize("gpus", [64, 128, 256])
def test_zero_1_is_recommended_wherever_it_fits(gpus: int) -> None:
    """On 64 to 256 H200 a layout of stage 1 fits and is within a tenth of the fastest; stages 2 and 3 are slower in
    the same layout.
    """
    plan = planned(config_80b(global_batch_size=4096), gpus=gpus, gpu="h200")
    assert plan.recommended is not None
    assert plan.recommended.layout.zero_stage == 1
    assert plan.recommended.step.total_s <= (1 + TIME_ERROR) * plan.fastest[0].step.total_s
    assert set(plan.other_stages) == {2, 3}
    assert min(each.step.total_s for each in plan.other_stages.values()) > plan.recommended.step.total_s


@pytest.mark.parametrize(("gpus", "size"), [(16, 8), (32, 4), (512, 4)])
def test_another_stage_is_recommended_where_it_is_faster_by_more_than_the_error(gpus: int, size: int) -> None:
    """On 16 and 32 H200 stage 1 leaves room for one row, which the host takes longer to launch than the device to
    compute, stage 2 for eight and more at a time; on 512, where a step is two passes, stage 1 for experts over eight
    ranks, stage 2 over four and without recomputing whole layers.
    """
    plan = planned(config_80b(global_batch_size=4096), gpus=gpus, gpu="h200")
    best = plan.recommended
    assert best == plan.fastest[0]
    assert (best.layout.zero_stage, best.layout.expert_parallel_size, best.layout.token_exchange) == (2, size, "dense")
    of_stage_1 = next(each for each in plan.fastest if each.layout.zero_stage == 1)
    assert of_stage_1.step.total_s > (1 + TIME_ERROR) * best.step.total_s


def test_two_in_flight_need_two_micro_batches() -> None:
    """With one row a GPU there is one micro-batch; a proposal of two in flight would be rejected."""
    plan = planned(config_80b(), gpus=256, gpu="h200")
    assert plan.fastest
    assert all(each.layout.micro_batches_in_flight == 1 for each in plan.fastest)


def test_progress_counts_up_to_all_layouts() -> None:
    """What a slow machine shows."""
    seen: list[tuple[int, int]] = []
    make_plan(
        config_80b(), gpus=64, gpu="h200", mfu=None, tokens=None, progress=lambda done, of: seen.append((done, of))
    )
    assert [done for done, _ in seen] == list(range(seen[0][1]))
    assert {of for _, of in seen} == {len(seen)}


@pytest.mark.parametrize(
    ("gpus", "mfu", "tokens", "match"),
    [
        (0, None, None, r"--gpus: 0"),
        (-8, None, None, r"--gpus: -8"),
        (64, 0.0, None, r"--mfu: 0\.0"),
        (64, 30.0, None, r"--mfu: 30\.0"),
        (64, float("nan"), None, "--mfu: nan"),
        (64, None, 0.0, r"--tokens: 0\.0"),
        (64, None, float("inf"), "--tokens: inf"),
        (64, None, float("nan"), "--tokens: nan"),
        (24, None, None, r"run\.global_batch_size 256 is not a multiple of world size 24"),
        (4, None, None, r"expert_parallel_size: 8 does not divide the world size 4"),
    ],
)
def test_impossible_inputs_are_one_line(gpus: int, mfu: float | None, tokens: float | None, match: str) -> None:
    """Foreseen errors name the setting and the value."""
    with pytest.raises(ConfigError, match=match) as caught:
        make_plan(config_80b(), gpus=gpus, gpu="h100", mfu=mfu, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_needs_no_torch() -> None:
    """Accounting and planner run where torch is not installed."""
    modules = ("flops", "megatron_flops", "memory", "activations", "layout", "hardware")
    imports = "".join(f"import qwen3next_train.accounting.{module};" for module in modules)
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['deepspeed'] = None;"
        f"{imports} import qwen3next_train.parameters, qwen3next_train.versions, qwen3next_train.planner.report"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("expert_parallel_size", "num_experts"), [(1, 4), (2, 4), (1, 8), (8, 16)])
def test_a_model_of_few_experts_has_layouts_that_fit(expert_parallel_size: int, num_experts: int) -> None:
    """Experts that are all on every rank get the same rows however tokens choose: nothing is uneven."""
    model = TINY.model_copy(update={"num_experts": num_experts})
    parallel = ParallelConfig(expert_parallel_size=expert_parallel_size, context_parallel_size=2)
    config = Config(model=model, run=RunConfig(global_batch_size=8), data=DataConfig(sequence_length=64))
    plan = planned(config.model_copy(update={"parallel": parallel}), gpus=8, gpu="h100")
    assert plan.fits
    assert {each.layout.expert_parallel_size for each in plan.fastest} == ({1, 2} if num_experts == 16 else {1})
    assert "no layout fits" not in format_plan(plan)
