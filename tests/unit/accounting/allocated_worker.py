"""Train one step of a small run and print what DeepSpeed holds, in bytes, beside what accounting says.

Run as ``torchrun --nproc-per-node N -m tests.unit.accounting.allocated_worker PRECISION ZERO_STAGE``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import memory_per_gpu
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.parallel.process_groups import process_context
from qwen3next_train.topology import Topology
from tests.distributed.layout_worker import rank_batches
from tests.unit.accounting.shapes import TINY


def held_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def gradient_bytes(model: torch.nn.Module, zero: Any) -> int:
    """What is accumulated: by stage 1 on the parameters (DeepSpeed's ``grad_accum``, or ``grad``), by stage 2 apart."""
    on_parameters = [
        vars(parameter)["grad_accum"] if vars(parameter).get("grad_accum") is not None else parameter.grad
        for parameter in model.parameters()
    ]
    apart = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
    return held_bytes([*on_parameters, *apart])


def main(precision: Any, zero_stage: Any) -> None:
    """One step of four rows, two at a time and rank."""
    config = Config.model_validate(
        {
            "model": TINY.model_dump(),
            "run": {"precision": precision, "global_batch_size": 8, "micro_batch_size": 2},
            "data": {"sequence_length": 16},
            "parallel": {"zero_stage": zero_stage},
        }
    )
    torch.set_num_threads(1)
    with process_context("cpu") as context:
        from qwen3next_train.engine.deepspeed_engine import DeepSpeedEngine
        from qwen3next_train.kernels.selection import select_kernels

        topology = Topology(context.world_size, context.rank)
        accumulation = 4 // context.world_size
        engine = DeepSpeedEngine(
            config,
            topology=topology,
            kernels=select_kernels(config.kernels, context.device),
            device=context.device,
            num_micro_batches=accumulation,
        )
        model, zero = engine._model, engine._engine.optimizer
        gradients: list[int] = []
        model.register_forward_pre_hook(lambda *_: gradients.append(gradient_bytes(model, zero)))
        batches = rank_batches(config, topology, 0, packed=True)
        totals = StepTotals((100, 100), 128, 1000, 4)
        engine.train_step(batches, totals=totals, lr=1e-3, report=Report.NONE)
        partitions = zero.single_partition_of_fp32_groups
        moments = [zero.optimizer.state[p][kind] for p in partitions for kind in ("exp_avg", "exp_avg_sq")]
        allocated = {
            "weights": held_bytes(model.parameters()),
            "gradients": gradients[-1],
            "optimizer": held_bytes([*partitions, *moments]),
        }
        layout = Layout(context.world_size, 1, zero_stage, precision, 2, 16)
        counted = memory_per_gpu(config.model, layout)
        if context.rank == 0:
            print(json.dumps({"allocated": allocated, "counted": {part: counted[part] for part in allocated}}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
