"""Measure a step of a small model as the benchmark of whole steps does; a task of :mod:`tests.distributed.ranks`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.architecture.tree import ROOT
from tests.integration.launching import SMALL_MODEL


def perform(context: ProcessContext, zero_stage: str, context_parallel_size: str, report: str) -> None:
    """Steps of one micro-batch, experts over all ranks; rank 0 writes the outcome."""
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    import bench_steps
    from bench_steps import Row, measure_row

    # Reading what the profiler has seen takes longer than the steps.
    bench_steps._PROFILED_STEPS = 1

    overrides = {
        **SMALL_MODEL,
        "parallel.zero_stage": zero_stage,
        "parallel.expert_parallel_size": context.world_size,
        "parallel.context_parallel_size": context_parallel_size,
        "run.micro_batch_size": 1,
        "run.global_batch_size": context.world_size // int(context_parallel_size),
        "data.sequence_length": 16,
    }
    config = load_config(
        [find_config("qwen3next_tiny.yaml")], [(key, str(value)) for key, value in overrides.items()]
    ).config
    outcome = measure_row(Row("", "", context.world_size, 1, ()), context, iterations=2, config=config)
    if context.rank == 0:
        Path(report).write_text(json.dumps(asdict(outcome)))
