"""What ``plan`` prints."""

from __future__ import annotations

import json

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import ScheduleConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.planner.report import format_plan, plan_command
from tests.unit.planner.configs import config_80b, planned

STEP_PARTS = {"model", "recompute", "exchange", "context", "gradients", "reduction", "update", "host", "idle"}


def test_json_has_the_documented_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly the contract's keys; parts add up to their totals."""
    assert plan_command(config_80b(), gpus=64, gpu="h100", mfu=0.3, tokens=1e12, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert {key: set(value) if isinstance(value, dict) else None for key, value in report.items()} == {
        "parameters": {"total", "active", "by_part"},
        "flops": {"per_token", "per_step", "by_part"},
        "flops_megatron": {"per_step"},
        "memory_per_gpu": {"total_bytes", "by_part", "fits", "host_bytes", "snapshot_bytes", "with_recompute"},
        "checkpoint_bytes": None,
        "step_time_s": None,
        "step_time_by_part": STEP_PARTS,
        "days": None,
        "fastest": None,
        "data": None,
        "validation_sets": set(),
    }
    assert len(report["fastest"]) == 5
    for layout in report["fastest"]:
        assert layout.keys() == {
            "expert_parallel_size",
            "context_parallel_size",
            "tensor_parallel_size",
            "zero_stage",
            "micro_batch_size",
            "micro_batches_in_flight",
            "token_exchange",
            "recompute",
            "step_time_s",
            "flops_per_gpu",
            "memory_bytes",
        }
        assert layout["step_time_s"] * layout["flops_per_gpu"] * 64 == pytest.approx(report["flops"]["per_step"])
    (source,) = report["data"]
    assert source.keys() == {"source", "share", "tokens", "epochs"}
    assert source["epochs"] == 953_675 * 256 * 4096 / source["tokens"]
    assert report["parameters"]["total"] == sum(report["parameters"]["by_part"].values()) == 81_324_862_720
    assert report["flops"]["per_step"] == sum(report["flops"]["by_part"].values())
    assert report["flops"]["per_token"] == 25_437_745_152
    assert report["flops_megatron"]["per_step"] == 2.629781417046835e16
    assert report["memory_per_gpu"]["total_bytes"] == sum(report["memory_per_gpu"]["by_part"].values())
    assert report["memory_per_gpu"]["fits"] is False
    recompute = report["memory_per_gpu"]["with_recompute"]
    assert [view["recompute"] for view in recompute][-2:] == [["norms", "activations", "gdn_prologue"], ["layer"]]
    for view in recompute:
        assert view.keys() == {"recompute", "total_bytes", "by_part", "fits"}
        assert sum(view["by_part"].values()) == view["total_bytes"] < report["memory_per_gpu"]["total_bytes"]
        assert view["fits"] is False
    assert report["checkpoint_bytes"] == 975_898_352_640


def test_json_without_a_device_has_nulls(capsys: pytest.CaptureFixture[str]) -> None:
    """``cpu`` is a plan without fit and times."""
    assert plan_command(config_80b(), gpus=64, gpu="cpu", mfu=None, tokens=None, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory_per_gpu"]["fits"] is None
    assert all(view["fits"] is None for view in report["memory_per_gpu"]["with_recompute"])
    assert report["step_time_s"] is None
    assert report["step_time_by_part"] is None
    assert report["days"] is None
    assert report["fastest"] == []


def test_table_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures a reader looks for, and lines that fit a wide terminal."""
    assert plan_command(config_80b(), gpus=64, gpu="h100", mfu=None, tokens=1e12, as_json=False) == 0
    out = capsys.readouterr().out
    assert "81,324,862,720, active per token 3,874,929,408" in out
    assert "25.44 GFLOP at sequence length 4096 (Megatron-LM counts 25.08 GFLOP)" in out
    assert "256 x 4096 = 1.05 M tokens = 26.67 PFLOP; per GPU 4 x 1 rows" in out
    assert "953,675 steps" in out
    assert "% MFU, by the table of rates" in out
    assert "\nstep time    model " in out
    assert "\nfastest      EP  CP  TP  ZeRO  micro-batch  in flight" in out
    assert "\nZeRO         stage 1 is slower · take stage 2 with EP " in out
    assert "975.90 GB" in out
    assert "\ndata         WARNING builtin:python-stdlib: " in out
    assert max(map(len, out.splitlines())) <= 132


def test_a_growing_batch_and_micro_batches_in_flight_are_said() -> None:
    """The work is that of the last batch, so the table says from where on; the memory is that of both in flight."""
    config = config_80b(micro_batches_in_flight=2)
    usual = planned(config, gpus=64, gpu="cpu")
    assert "\nramp-up" not in format_plan(usual)
    schedule = ScheduleConfig(rampup_batch_size=[64, 64, 192])
    plan = planned(config.model_copy(update={"schedule": schedule}), gpus=64, gpu="cpu")
    assert "\nramp-up      64 rows at first, 64 more at a time, 256 from step 3 on\n" in format_plan(plan)
    assert "\nmemory/GPU   EP 8, DP 64, ZeRO-1, bf16, 2 in flight: " in format_plan(plan)


def test_table_of_a_layout_that_does_not_fit() -> None:
    """It says so, names the largest part and what to set instead."""
    plan = planned(config_80b(sequence_length=1024), gpus=64, gpu="h100", mfu=0.3)
    lines = format_plan(plan).splitlines()
    assert any(line.endswith("of 85.52 GB on h100: DOES NOT FIT") for line in lines)
    assert any(line.startswith("too large    most of all gradients, 49.08 GB") for line in lines)
    assert any(line.startswith("change to    parallel.") for line in lines)


def test_recompute_is_said_as_it_is_written() -> None:
    """What activations take now, and for each further value of the setting what would be left and whether it fits."""
    lines = format_plan(planned(config_80b(zero_stage=2), gpus=64, gpu="h100", mfu=0.3)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("recompute"))
    assert lines[start].startswith("recompute    []; activations take 31.")
    assert lines[start + 2].endswith("does not fit")
    assert "[norms, activations, gdn_prologue] would leave " in lines[start + 3]
    assert lines[start + 3].endswith(" GB, fits")
    assert "[layer] would leave 1.61 GB" in lines[start + 4]
    assert lines[start + 4].endswith("fits, 28% more work")


def test_advice_is_settings_as_they_are_written() -> None:
    """Each proposal can be pasted: key and value, the list in brackets."""
    plan = planned(config_80b(), gpus=8, gpu="h100")
    lines = [line[13:] for line in format_plan(plan).splitlines() if "parallel." in line and "would" not in line]
    assert "parallel.recompute [" in lines[0]
    assert "parallel.offload_optimizer cpu (takes 183.62 GB of host memory for each GPU)" in lines[0]
    config = config_80b(recompute=["layer"])
    assert any(
        "[layer]; activations" in line for line in format_plan(planned(config, gpus=64, gpu="h100")).splitlines()
    )


def test_the_source_of_the_time_is_said() -> None:
    """Measured, scaled or stated."""
    for gpu, mfu, basis in (
        ("h200", None, "% MFU, by the table of rates"),
        ("b200", None, "% MFU, an estimate: rates of the h100, scaled"),
        ("b200", 0.2, "450 TFLOP/s a GPU, 20.0% MFU, at the stated MFU"),
    ):
        assert basis in format_plan(planned(config_80b(), gpus=64, gpu=gpu, mfu=mfu))


def test_what_is_not_measured_is_said() -> None:
    """Rates between nodes where there are several; two in flight where the table has them."""
    between = "; those between nodes are not measured"
    in_flight = "what two micro-batches in flight hide between nodes is expected"
    for gpus, rows, gpu, expected in ((64, 1, "h200", (True, False)), (64, 4, "h200", (True, True))):
        config = config_80b(global_batch_size=gpus * rows)
        text = format_plan(planned(config, gpus=gpus, gpu=gpu))
        assert (between in text, in_flight in text) == expected
    one_node = planned(config_80b(), gpus=8, gpu="h200")
    assert between not in format_plan(one_node)
    stated = planned(config_80b(), gpus=64, gpu="h200", mfu=0.3)
    assert between not in format_plan(stated)


def test_fast_layouts_that_share_rows_say_so() -> None:
    """Rows of 128k tokens on 16 H200 fit where several ranks share one."""
    config = config_80b(sequence_length=131_072, expert_parallel_size=16, global_batch_size=16)
    plan = planned(config, gpus=16, gpu="h200")
    lines = format_plan(plan).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("fastest"))
    shown = [tuple(map(int, line.split()[:4])) for line in lines[first + 1 : first + 1 + len(plan.fastest)]]
    assert shown == [
        (layout.expert_parallel_size, layout.context_parallel_size, layout.tensor_parallel_size, layout.zero_stage)
        for layout in (each.layout for each in plan.fastest)
    ]
    assert plan.recommended is not None
    best = plan.recommended.layout
    assert best.context_parallel_size > 1
    sizes = f"EP {best.expert_parallel_size} and CP {best.context_parallel_size}"
    sizes += f" and TP {best.tensor_parallel_size}" if best.tensor_parallel_size > 1 else ""
    sizes += f" and parallel.token_exchange {best.token_exchange}" if best.token_exchange != "exact" else ""
    assert f"with {sizes}: " in format_plan(plan)


def test_layouts_that_only_fit_offloaded_are_not_called_fast() -> None:
    """8 H100 hold the 80B with its optimizer in host memory only."""
    text = format_plan(planned(config_80b(), gpus=8, gpu="h100"))
    assert "\nfastest      no layout fits 8 h100 without an offloaded optimizer" in text


@pytest.mark.parametrize(
    ("gpus", "batch", "text"),
    [
        (
            7,
            7,
            "shorter rows included; run.global_batch_size 7 does not divide over 2 times the GPUs: choose",
        ),
        (
            6,
            12,
            "neither 2 times the GPUs nor shorter rows; run.global_batch_size 12 does not divide over 4 times the GPUs",
        ),
        (1, 64, "neither 32 times the GPUs nor shorter rows: choose a larger GPU"),
    ],
)
def test_where_nothing_fits_it_says_how_many_gpus_the_batch_allowed(gpus: int, batch: int, text: str) -> None:
    config = config_80b(expert_parallel_size=1, global_batch_size=batch)
    assert f"\nchange       nothing tried fits, {text}" in format_plan(planned(config, gpus=gpus, gpu="l4"))


def test_other_stages_are_compared_in_the_same_layout() -> None:
    """By how much, in words, from the times of the plan."""
    plan = planned(config_80b(global_batch_size=1024), gpus=64, gpu="h200")
    assert plan.recommended is not None
    best = plan.recommended.step.total_s
    costs = [f"stage {stage} {each.step.total_s / best - 1:.0%} more" for stage, each in plan.other_stages.items()]
    assert f"the same layout would take under {costs[0]}, {costs[1]}" in format_plan(plan)


def test_another_stage_that_does_not_fit_is_said_not_to() -> None:
    """Stage 1 of what stage 2 makes room for would be faster."""
    config = config_80b(global_batch_size=1024, micro_batch_size=4)
    plan = planned(config, gpus=64, gpu="h100")
    assert plan.device is not None
    assert plan.recommended is not None
    assert plan.recommended.layout.zero_stage == 2
    without = plan.other_stages[1]
    assert without.memory_bytes > plan.device.memory_bytes
    less = 1 - without.step.total_s / plan.recommended.step.total_s
    assert less > 0
    assert f"the same layout would take under stage 1 {less:.0%} less and not fit, stage 3 " in format_plan(plan)


def test_stages_of_one_rank_take_as_long() -> None:
    """Which shares nothing; the host launches the same under each."""
    config = load_config([find_config("qwen3next_20m.yaml")], []).config
    text = format_plan(planned(config, gpus=1, gpu="h100"))
    assert "the same layout would take under stage 2 as long, stage 3 as long\n" in text


def test_table_of_a_layout_that_fits() -> None:
    """No advice where none is needed."""
    plan = planned(config_80b(zero_stage=2), gpus=64, gpu="b200", mfu=0.3)
    text = format_plan(plan)
    assert ": fits" in text
    assert "\nchange" not in text
    assert "\ntoo large" not in text


def test_hopeless_layout_is_said_to_be_one() -> None:
    """No proposal is better than a wrong one."""
    config = config_80b(global_batch_size=1, expert_parallel_size=1)
    text = format_plan(planned(config, gpus=1, gpu="rtx3090"))
    assert "choose a larger GPU" in text


def test_unknown_gpu_is_an_error_that_lists_the_known() -> None:
    """A misspelt name never becomes another device."""
    with pytest.raises(ConfigError, match=r"unknown GPU 'h1000'; choose one of a100-40, .*h100, .* or cpu") as caught:
        plan_command(config_80b(), gpus=64, gpu="h1000", mfu=None, tokens=None, as_json=False)
    assert "\n" not in str(caught.value)
