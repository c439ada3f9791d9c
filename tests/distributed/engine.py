"""The engine as training builds it, on the ranks of a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3next_train.config.schema import Config
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.parallel.process_groups import ProcessContext

if TYPE_CHECKING:
    from qwen3next_train.engine.step_clock import StepClock
    from qwen3next_train.engine.zero_engine import ZeroEngine


def build_engine(config: Config, context: ProcessContext, clock: StepClock | None = None) -> ZeroEngine:
    """An engine with new weights."""
    # DeepSpeed chooses its accelerator when it is first imported: the one that the context has decided on.
    from qwen3next_train.engine.zero_engine import ZeroEngine

    topology = context.topology(config.parallel)
    return ZeroEngine(
        config,
        topology=topology,
        kernels=select_kernels(config.kernels, context.device),
        device=context.device,
        num_micro_batches=config.run.global_batch_size // config.run.micro_batch_size // topology.data_parallel_size,
        clock=clock,
    )
