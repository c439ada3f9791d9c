"""What the pages say a layout is planned to take is what ``plan`` says."""

from __future__ import annotations

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.planner.report import format_plan
from tests.architecture.tree import ROOT
from tests.unit.planner.configs import planned, planned_alone

_PARTS = ("parallel.recompute", "[norms,activations,gdn_prologue]")
_EXACT = ("parallel.token_exchange", "exact")
_FP32 = ("parallel.gradient_dtype", "fp32")
_ONE_ROW = ("run.micro_batch_size", "1")

KNOBS: dict[str, list[tuple[str, str]]] = {
    "| none |": [],
    "| `--parallel.token_exchange exact` |": [_EXACT],
    "| `--run.micro_batch_size 4` |": [("run.micro_batch_size", "4")],
    "| `--run.micro_batch_size 1` |": [_ONE_ROW],
    "| `--run.global_batch_size 256`, sixteen": [("run.global_batch_size", "256")],
    "| `--parallel.recompute [norms,activations,gdn_prologue]` |": [_PARTS],
    "| the same with `--run.micro_batch_size 1` |": [_PARTS, _ONE_ROW],
    "| these two over `--parallel.context_parallel_size 4` |": [
        _PARTS,
        _ONE_ROW,
        ("parallel.context_parallel_size", "4"),
    ],
    "| these two over `--parallel.tensor_parallel_size 2` |": [
        _PARTS,
        _ONE_ROW,
        ("parallel.tensor_parallel_size", "2"),
    ],
    "| exact, `--parallel.offload_optimizer cpu": [_EXACT, _FP32, _PARTS, ("parallel.offload_optimizer", "cpu")],
    "| exact, `--optimizer.moments_dtype fp32": [_EXACT, ("optimizer.moments_dtype", "fp32")],
    "| exact, `--parallel.zero_stage 2": [_EXACT, ("parallel.zero_stage", "2")],
    "| `--parallel.expert_parallel_size 4` |": [("parallel.expert_parallel_size", "4")],
}
"""How a row of the 80B's other knobs begins, and what it changes."""


def test_every_knob_is_compared() -> None:
    """Or a row that the table of rates no longer gives would stay."""
    page = (ROOT / "docs/benchmarks/whole-80b.md").read_text()
    rows = page.split("### Other knobs", 1)[1].split("|--:|\n", 1)[1].split("\n\n", 1)[0].splitlines()
    assert [next((knob for knob in KNOBS if row.startswith(knob)), row) for row in rows] == list(KNOBS)


@pytest.mark.parametrize("beginning", KNOBS)
def test_knobs_of_the_80b_on_eight_h200(beginning: str) -> None:
    lines = (ROOT / "docs/benchmarks/whole-80b.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(beginning)]
    *_, memory, seconds, rate = (cell.strip() for cell in row.strip("|").split("|"))
    config = load_config([ROOT / "configs/qwen3next_80b_8xh200.yaml"], KNOBS[beginning]).config
    text = format_plan(planned_alone(config, gpus=8, gpu="h200"))
    assert f"{memory.removesuffix(', fits')} GB of 150.75 GB" in text
    assert f" {float(seconds):.3g} s a step" in text
    assert f" {rate} TFLOP/s a GPU, " in text


@pytest.mark.slow
def test_the_fastest_layouts_of_long_rows() -> None:
    sizes = {"context_parallel_size": "16", "expert_parallel_size": "16", "zero_stage": "2"}
    batch = {"data.sequence_length": "262144", "run.global_batch_size": "16", "run.micro_batch_size": "1"}
    overrides = [*((f"parallel.{key}", value) for key, value in sizes.items()), *batch.items()]
    config = load_config([ROOT / "configs/qwen3next_80b.yaml"], overrides).config
    text = format_plan(planned(config, gpus=16, gpu="h200"))
    page = (ROOT / "docs/long-context.md").read_text()
    rows = page.split("recompute\n", 1)[1].split("```", 1)[0].splitlines()
    assert len(rows) == 5
    for row in rows:
        assert row in text
