"""The numbers of a plan and the changes it proposes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.config.schema import Config, RunConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.layouts import USABLE_FRACTION
from qwen3next_train.planner.plan import ASSUMED_MFU, make_plan
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, TINY
from tests.unit.planner.configs import config_80b


def test_step_and_time() -> None:
    """Step time is FLOPs over peak x MFU; tokens round up to whole steps."""
    plan = make_plan(config_80b(), gpus=64, gpu="h100", mfu=0.4, tokens=1e12)
    assert plan.workload.num_tokens == 256 * 4096
    assert plan.workload.flops_per_step == 26_673_409_060_503_552
    assert plan.workload.flops_per_token == 25_437_745_152
    assert plan.workload.flops_megatron == 2.629781417046835e16
    assert plan.step_time_s == pytest.approx(26_673_409_060_503_552 / (64 * 989.4e12 * 0.4))
    assert plan.num_steps == 953_675
    assert plan.days == pytest.approx(953_675 * 1.05307 / 86_400, rel=1e-4)
    assert plan.checkpoint_bytes == 12 * 81_324_862_720


def test_defaults_are_run_steps_and_a_marked_mfu() -> None:
    """What nobody stated is the run's own length and an MFU that says it is assumed."""
    plan = make_plan(config_80b(steps=77), gpus=64, gpu="h100", mfu=None, tokens=None)
    assert plan.num_steps == 77
    assert plan.mfu == ASSUMED_MFU
    assert plan.mfu_is_assumed


def test_fp32_runs_have_the_fp32_peak() -> None:
    """A bf16 peak would make an fp32 run look 15 times too fast."""
    config = Config(model=TINY, run=RunConfig(precision="fp32", global_batch_size=4))
    plan = make_plan(config, gpus=1, gpu="h100", mfu=0.5, tokens=None)
    assert plan.step_time_s == pytest.approx(plan.workload.flops_per_step / (66.9e12 * 0.5))


def test_unknown_device_is_not_judged() -> None:
    """No fit, no times, no traffic; the rest stands."""
    plan = make_plan(config_80b(), gpus=64, gpu="NVIDIA RTX Something", mfu=0.3, tokens=1e12)
    assert plan.device is None
    assert plan.fits is None
    assert plan.step_time_s is None
    assert plan.days is None
    assert plan.traffic is None
    assert plan.memory_bytes > 0


def _with_layout(layout: Layout) -> Config:
    return config_80b(
        expert_parallel_size=layout.expert_parallel_size,
        zero_stage=layout.zero_stage,
        micro_batch_size=layout.micro_batch_size,
        sequence_length=layout.sequence_length,
    )


@pytest.mark.parametrize(
    ("gpus", "gpu", "sequence_length", "micro_batch_size"),
    [(8, "h200", 4096, 1), (64, "h100", 1024, 4), (64, "h100", 4096, 1), (16, "b200", 4096, 2), (8, "a100-80", 64, 1)],
)
def test_proposed_changes_fit(gpus: int, gpu: str, sequence_length: int, micro_batch_size: int) -> None:
    """Every proposal, planned for itself, is a valid layout that fits."""
    config = config_80b(sequence_length=sequence_length, micro_batch_size=micro_batch_size)
    plan = make_plan(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None)
    assert plan.fits is False
    assert plan.changes
    assert plan.layout not in plan.changes
    for layout in plan.changes:
        proposed = make_plan(_with_layout(layout), gpus=layout.world_size, gpu=gpu, mfu=None, tokens=None)
        assert proposed.fits


def test_fewest_changes_come_first() -> None:
    """When one setting is enough, no proposal in front of it changes two."""
    plan = make_plan(config_80b(sequence_length=1024), gpus=64, gpu="h100", mfu=None, tokens=None)
    counts = [
        (new.expert_parallel_size != 8) + (new.zero_stage != 1) + (new.micro_batch_size != 1) for new in plan.changes
    ]
    assert counts[0] == 1
    assert counts == sorted(counts)


def test_hopeless_layouts_have_no_changes() -> None:
    """80 B parameters never fit one small GPU, nor any number that divides the batch of 1."""
    config = config_80b(global_batch_size=1, expert_parallel_size=1)
    plan = make_plan(config, gpus=1, gpu="rtx3090", mfu=None, tokens=None)
    assert plan.fits is False
    assert plan.changes == ()


def test_fit_leaves_a_margin() -> None:
    """A plan may not fill the last twentieth of the memory."""
    plan = make_plan(config_80b(zero_stage=3, expert_parallel_size=8), gpus=64, gpu="b200", mfu=None, tokens=None)
    assert plan.device is not None
    assert plan.fits == (plan.memory_bytes <= USABLE_FRACTION * plan.device.memory_bytes)
    assert plan.fits is True


def test_all_to_all_bytes_by_hand() -> None:
    """4 crossings x 49 blocks x 10 copies x 4 KiB x a rank's tokens, 7 of 8 to other ranks."""
    plan = make_plan(config_80b(), gpus=64, gpu="h100", mfu=None, tokens=None)
    assert plan.traffic is not None
    assert plan.traffic.all_to_all_bytes == 4 * 49 * 10 * 4096 * (4 * 4096) * 7 // 8
    assert plan.traffic.all_to_all_s == pytest.approx(plan.traffic.all_to_all_bytes / 450e9)
    across = make_plan(config_80b(expert_parallel_size=32), gpus=64, gpu="h100", mfu=None, tokens=None)
    assert across.traffic is not None
    to_one_rank = 4 * 49 * 10 * 4096 * (4 * 4096) // 32
    assert across.traffic.all_to_all_bytes == 31 * to_one_rank
    assert across.traffic.all_to_all_s == pytest.approx(24 * to_one_rank / 50e9), "three of four ranks are elsewhere"


def test_state_bytes_and_seconds_by_hand() -> None:
    """ZeRO-1 sends ten bytes an element a step; what all eight GPUs of a node share uses their eight network links."""
    plan = make_plan(config_80b(), gpus=64, gpu="h100", mfu=None, tokens=None)
    assert plan.traffic is not None
    experts = sum(spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if spec.expert) // 8
    dense = sum(spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if not spec.expert)
    sent = 10 * experts * 7 / 8, 10 * dense * 63 / 64
    assert plan.traffic.state_bytes == pytest.approx(sum(sent), rel=1e-6)
    assert plan.traffic.state_s == pytest.approx(sent[0] / 50e9 + sent[1] / 400e9, rel=1e-6)
    node = make_plan(config_80b(), gpus=8, gpu="h100", mfu=None, tokens=None)
    assert node.traffic is not None
    assert node.traffic.state_s == pytest.approx(node.traffic.state_bytes / 450e9)


@pytest.mark.parametrize("gpus", [64, 256])
def test_80b_on_h100_needs_recomputation_or_shorter_rows(gpus: int) -> None:
    """The shipped layout keeps 49 GB of fp32 gradients; what is proposed keeps eight experts a rank."""
    plan = make_plan(config_80b(), gpus=gpus, gpu="h100", mfu=None, tokens=None)
    assert plan.fits is False
    assert all(layout.sequence_length < 4096 for layout in plan.changes)
    selective, full = plan.recompute
    assert (selective.mode, full.mode) == ("selective", "full")
    assert selective.fits is full.fits is False
    nearest = full.changes[0]
    assert (nearest.world_size, nearest.sequence_length, nearest.zero_stage) == (gpus, 4096, 1)
    assert nearest.expert_parallel_size == {64: 16, 256: 64}[gpus]
    assert all(512 // layout.expert_parallel_size >= 8 for layout in (*plan.changes, *full.changes))
    assert all(layout.zero_stage != 3 for layout in (*plan.changes, *full.changes)), "one dtype only"


def test_recomputation_takes_less_memory_and_a_forward_pass_of_the_layers() -> None:
    """The same weights, gradients and logits; a third more work, but for the heads and MTP's projection."""
    plan = make_plan(config_80b(zero_stage=2), gpus=64, gpu="h100", mfu=None, tokens=None)
    selective, full = plan.recompute
    totals = [sum(parts.values()) for parts in (full.memory_by_part, selective.memory_by_part, plan.memory_by_part)]
    assert totals == sorted(totals)
    for view in plan.recompute:
        for part in ("weights", "gradients", "optimizer", "zero_buffers", "logits", "all_to_all", "runtime"):
            assert view.memory_by_part[part] == plan.memory_by_part[part]
    flops = plan.workload.flops_by_part
    outside = flops["head"] + flops["mtp_head"] + flops["mtp_fc"]
    assert full.extra_work == pytest.approx((1 - outside / plan.workload.flops_per_step) / 3)
    assert 0 < selective.extra_work < 1e-3
    assert full.fits is True
    assert full.changes == ()


def test_one_gpu_sends_nothing() -> None:
    """A single process has no traffic at any stage."""
    plan = make_plan(Config(model=TINY), gpus=1, gpu="h100", mfu=None, tokens=None)
    assert plan.traffic is not None
    assert plan.traffic.all_to_all_bytes == plan.traffic.state_bytes == 0


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
    """Foreseen faults name the setting and the value."""
    with pytest.raises(ConfigError, match=match) as caught:
        make_plan(config_80b(), gpus=gpus, gpu="h100", mfu=mfu, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_needs_no_torch() -> None:
    """Accounting and planner run where torch is not installed."""
    modules = ("flops", "megatron_flops", "memory", "activations", "layout", "hardware", "params")
    imports = "".join(f"import qwen3next_train.accounting.{module};" for module in modules)
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['deepspeed'] = None;"
        f"{imports} import qwen3next_train.planner.report"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
