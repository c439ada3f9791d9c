"""Configurations the planner tests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import pytest

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import (
    Config,
    DataConfig,
    ParallelConfig,
    RecomputePart,
    RunConfig,
    ScheduleConfig,
)
from qwen3next_train.planner import plan
from tests.unit.accounting.shapes import QWEN3_NEXT_80B


def config_80b(
    *,
    expert_parallel_size: int = 8,
    zero_stage: Literal[1, 2, 3] = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 256,
    sequence_length: int = 4096,
    steps: int = 1000,
    recompute: Iterable[RecomputePart] = (),
    micro_batches_in_flight: int = 1,
    context_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
) -> Config:
    """The 80B under one layout."""
    return Config(
        model=QWEN3_NEXT_80B,
        run=RunConfig(steps=steps, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
        data=DataConfig(sequence_length=sequence_length),
        parallel=ParallelConfig(
            expert_parallel_size=expert_parallel_size,
            context_parallel_size=context_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            zero_stage=zero_stage,
            recompute=list(recompute),
            micro_batches_in_flight=2 if micro_batches_in_flight == 2 else 1,
        ),
    )


_plans: dict[tuple[str, int, str], plan.Plan] = {}


def planned(config: Config, *, gpus: int, gpu: str, mfu: float | None = None) -> plan.Plan:
    """The plan of the run's own steps, made once for all tests that ask for it: the search takes most of a second."""
    key = config.model_dump_json(), gpus, gpu
    if key not in _plans:
        _plans[key] = plan.make_plan(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None)
    return replace(_plans[key], stated_mfu=mfu)


def planned_alone(config: Config, *, gpus: int, gpu: str) -> plan.Plan:
    """:func:`planned` without the search for other layouts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "fastest_layouts", lambda *arguments: ())
        patch.setattr(plan, "layouts_that_fit", lambda *arguments: ())
        return plan.make_plan(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None)


def config_of(layout: Layout, *, global_batch_size: int = 256, rampup: Sequence[int] = ()) -> Config:
    """The 80B as ``layout`` has it, with ``schedule.rampup_batch_size``."""
    config = with_layout(config_80b(global_batch_size=global_batch_size), layout)
    return config.model_copy(update={"schedule": ScheduleConfig(rampup_batch_size=list(rampup))})


def with_layout(config: Config, layout: Layout) -> Config:
    """The configuration as ``layout`` has it."""

    def section(name: str, **values: object) -> object:
        return getattr(config, name).model_copy(update=values)

    return config.model_copy(
        update={
            "run": section("run", micro_batch_size=layout.micro_batch_size),
            "data": section("data", sequence_length=layout.sequence_length),
            "optimizer": section("optimizer", moments_dtype=layout.moments_dtype),
            "parallel": section(
                "parallel",
                expert_parallel_size=layout.expert_parallel_size,
                context_parallel_size=layout.context_parallel_size,
                tensor_parallel_size=layout.tensor_parallel_size,
                zero_stage=layout.zero_stage,
                token_exchange=layout.token_exchange,
                micro_batches_in_flight=layout.micro_batches_in_flight,
                recompute=sorted(layout.recompute),
                gradient_dtype=layout.gradient_dtype,
                offload_optimizer="cpu" if layout.offload_optimizer else "none",
            ),
        }
    )
