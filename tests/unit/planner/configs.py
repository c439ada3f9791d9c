"""Configurations the planner tests share."""

from __future__ import annotations

from typing import Literal

from qwen3next_train.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from tests.unit.accounting.shapes import QWEN3_NEXT_80B


def config_80b(
    *,
    expert_parallel_size: int = 8,
    zero_stage: Literal[1, 2, 3] = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 256,
    sequence_length: int = 4096,
    steps: int = 1000,
) -> Config:
    """The 80B under one layout."""
    return Config(
        model=QWEN3_NEXT_80B,
        run=RunConfig(steps=steps, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
        data=DataConfig(sequence_length=sequence_length),
        parallel=ParallelConfig(expert_parallel_size=expert_parallel_size, zero_stage=zero_stage),
    )
