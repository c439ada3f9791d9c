"""The engine as training builds it, on the ranks of a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3next_train.config.schema import Config
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.topology import Topology

if TYPE_CHECKING:
    from qwen3next_train.engine.step_clock import StepClock
    from qwen3next_train.engine.zero_engine import ZeroEngine


def topology_of(config: Config, context: ProcessContext) -> Topology:
    """This rank's place."""
    parallel = config.parallel
    return Topology(
        context.world_size,
        context.rank,
        parallel.expert_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )


def build_engine(config: Config, context: ProcessContext, clock: StepClock | None = None) -> ZeroEngine:
    """An engine with new weights."""
    # DeepSpeed chooses its accelerator when it is first imported: the one that the context has decided on.
    from qwen3next_train.engine.zero_engine import ZeroEngine

    topology = topology_of(config, context)
    return ZeroEngine(
        config,
        topology=topology,
        kernels=select_kernels(config.kernels, context.device),
        device=context.device,
        num_micro_batches=config.run.global_batch_size // config.run.micro_batch_size // topology.data_parallel_size,
        clock=clock,
    )
