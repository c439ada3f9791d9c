"""What the pages say a layout is planned to take is what ``plan`` says."""

from __future__ import annotations

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.planner.plan import Plan
from qwen3next_train.planner.report import format_plan
from tests.architecture.tree import ROOT
from tests.unit.planner.configs import planned

_PARTS = ("parallel.recompute", "[norms,activations,gdn_prologue]")
_EXACT = ("parallel.token_exchange", "exact")
_FP32 = ("parallel.gradient_dtype", "fp32")

KNOBS: dict[str, list[tuple[str, str]]] = {
    "| none |": [],
    "| `--parallel.token_exchange exact` |": [_EXACT],
    "| `--run.micro_batch_size 4` |": [("run.micro_batch_size", "4")],
    "| `--run.global_batch_size 256`, sixteen": [("run.global_batch_size", "256")],
    "| `--parallel.recompute [norms,activations,gdn_prologue]` |": [_PARTS],
    "| exact, `--parallel.offload_optimizer cpu": [_EXACT, _FP32, _PARTS, ("parallel.offload_optimizer", "cpu")],
    "| exact, `--parallel.zero_stage 2": [_EXACT, ("parallel.zero_stage", "2")],
    "| `--parallel.expert_parallel_size 4` |": [("parallel.expert_parallel_size", "4")],
}
"""How a row of the 80B's other knobs begins, and what it changes."""


def _plan(name: str, overrides: list[tuple[str, str]], gpus: int) -> Plan:
    config = load_config([ROOT / "configs" / name], overrides).config
    return planned(config, gpus=gpus, gpu="h200")


@pytest.mark.parametrize("beginning", KNOBS)
def test_knobs_of_the_80b_on_eight_h200(beginning: str) -> None:
    lines = (ROOT / "docs/benchmarks/whole-80b.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(beginning)]
    *_, memory, seconds, rate = (cell.strip() for cell in row.strip("|").split("|"))
    text = format_plan(_plan("qwen3next_80b_8xh200.yaml", KNOBS[beginning], 8))
    assert f"{memory.removesuffix(', fits')} GB of 150.75 GB" in text
    assert f" {float(seconds):.3g} s a step" in text
    assert f" {rate} TFLOP/s a GPU, " in text


@pytest.mark.slow
def test_the_fastest_layouts_of_long_rows() -> None:
    sizes = {"context_parallel_size": "16", "expert_parallel_size": "16", "zero_stage": "2"}
    batch = {"data.sequence_length": "262144", "run.global_batch_size": "16", "run.micro_batch_size": "1"}
    overrides = [*((f"parallel.{key}", value) for key, value in sizes.items()), *batch.items()]
    text = format_plan(_plan("qwen3next_80b.yaml", overrides, 16))
    page = (ROOT / "docs/long-context.md").read_text()
    rows = page.split("recompute\n", 1)[1].split("```", 1)[0].splitlines()
    assert len(rows) == 5
    for row in rows:
        assert row in text
