"""What the log opens with."""

import logging

import pytest
import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.log import get_logger
from qwen3next_train.train.opening import opened_with, opening_lines

CPU = torch.device("cpu")


def lines(*overrides, world_size=1):
    config = load_config([shipped_folder() / "qwen3next_tiny.yaml"], [("run.dir", "runs/mine"), *overrides]).config
    return opening_lines(config, Layout.of(config, world_size), CPU)


def test_the_tiny_run():
    assert lines() == [
        "model       1,652,008 parameters, 1,331,176 active per token",
        "step        16 x 256 = 4,096 tokens, 39.0 GFLOP; 2 x 8 rows a process",
        "run         440 steps = 1.80 M tokens, 17.1 TFLOP",
        "layout      1 process on CPU, fp32, ZeRO-1",
        "output      runs/mine, a checkpoint every 110 steps",
    ]


def test_a_growing_batch_is_said_and_counted():
    # 8 rows for as many steps as take 32 samples, then 16: 4 steps of 8 and 436 of 16.
    found = lines(("schedule.rampup_batch_size", "[8, 8, 32]"))
    assert found[1:4] == [
        "step        16 x 256 = 4,096 tokens, 39.0 GFLOP; 2 x 8 rows a process",
        "ramp-up     8 rows at first, 8 more at a time, 16 from step 5 on",
        "run         440 steps = 1.79 M tokens, 17.1 TFLOP",
    ]


def test_what_is_not_usual_is_said():
    found = lines(
        ("run.micro_batch_size", "1"),
        ("checkpoint.interval", "0"),
        ("parallel.zero_stage", "2"),
        ("parallel.expert_parallel_size", "4"),
        ("parallel.recompute", "[norms, layer]"),
        ("parallel.offload_optimizer", "cpu"),
        world_size=4,
    )
    assert found[1].endswith("; 4 x 1 rows a process")
    assert found[3] == (
        "layout      4 processes on CPU, fp32, ZeRO-2, experts over 4 ranks, exact exchange, recompute norms + layer, "
        "optimizer in host memory"
    )
    assert found[4] == "output      runs/mine, a checkpoint at the end"


def test_rows_over_several_ranks_are_said():
    found = lines(("run.micro_batch_size", "1"), ("parallel.context_parallel_size", "2"), world_size=4)
    assert found[1].endswith("; 8 x 1 rows a process")
    assert found[3] == "layout      4 processes on CPU, fp32, ZeRO-1, rows over 2 ranks"


def test_micro_batches_in_flight_are_said():
    found = lines(("run.micro_batch_size", "1"), ("parallel.micro_batches_in_flight", "2"), world_size=2)
    assert found[3] == "layout      2 processes on CPU, fp32, ZeRO-1, 2 micro-batches in flight"


@pytest.mark.parametrize("said", [[], ["source: 3 documents", "resumed"]])
def test_the_log_opens_with_it(capsys, said):
    with opened_with(["model", "step"]):
        for line in said:
            get_logger().info(line)
    get_logger().info("after")
    assert capsys.readouterr().err.splitlines() == ["model", "step", *said, "after"]


def test_a_rejected_start_says_nothing_but_the_error(capsys):
    filters = len(logging.getLogger("qwen3next_train").filters)
    with pytest.raises(ValueError, match="no such file"), opened_with(["model", "step"]):
        raise ValueError("no such file")
    get_logger().error("no such file")
    assert capsys.readouterr().err.splitlines() == ["no such file"]
    assert len(logging.getLogger("qwen3next_train").filters) == filters
