"""Train one step of a small run and write what DeepSpeed holds, in bytes, beside what accounting says.

A task of :mod:`tests.distributed.ranks`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import host_bytes_per_gpu, memory_per_gpu
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.engine.gradient_buckets import GradientBucketOptimizer
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches
from tests.unit.accounting.shapes import TINY

_MORE_HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


def held_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def gradient_bytes(model: torch.nn.Module, zero: Any) -> int:
    """What is accumulated: in buckets, on the parameters (``grad_accum`` or ``grad``), or apart."""
    if isinstance(zero, GradientBucketOptimizer):
        # Under stage 1 partitions are parts of buffers, which are counted.
        return held_bytes(bucket.partition for bucket in zero._buckets)
    on_parameters = [
        vars(parameter)["grad_accum"] if vars(parameter).get("grad_accum") is not None else parameter.grad
        for parameter in model.parameters()
    ]
    if hasattr(zero, "grad_partitions_flat_buffer"):
        return held_bytes([zero.grad_partitions_flat_buffer])
    apart = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
    return held_bytes([*on_parameters, *apart])


def partitions_of(zero: Any) -> list[torch.Tensor]:
    """Flat fp32 master weights of this rank."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def weight_bytes(model: torch.nn.Module, zero: Any) -> int:
    """Of the dtype the model computes with; under stage 3 partitions, and whole parameters that stay gathered."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return held_bytes(model.parameters())
    pieces = [vars(parameter)["ds_tensor"] for parameter in model.parameters()]
    return held_bytes([*pieces, *zero.persistent_parameters])


def host_bytes(zero: Any) -> int:
    """What an offloaded optimizer adds to host memory besides master and moments: gradient, weights, a buffer."""
    gradients = [partition.grad for partition in zero.single_partition_of_fp32_groups]
    return held_bytes(
        [*gradients, *zero.param_buffer_of_bit16_for_cpu_offload_groups, zero.temp_grad_buffer_for_cpu_offload]
    )


def perform(
    context: ProcessContext,
    precision: Any,
    zero_stage: str,
    moments_dtype: Any,
    offload: Any,
    expert_parallel_size: str,
    tensor_parallel_size: str,
    report: str,
) -> None:
    """One step of four rows, two at a time and rank; rank 0 writes the file ``report``."""
    config = Config.model_validate(
        {
            "model": TINY.model_dump() | (_MORE_HEADS if int(tensor_parallel_size) > 1 else {}),
            "run": {"precision": precision, "global_batch_size": 8, "micro_batch_size": 2},
            "data": {"sequence_length": 16},
            "parallel": {
                "zero_stage": int(zero_stage),
                "offload_optimizer": offload,
                "expert_parallel_size": int(expert_parallel_size),
                "tensor_parallel_size": int(tensor_parallel_size),
            },
            "optimizer": {"moments_dtype": moments_dtype},
        }
    )
    engine = build_engine(config, context)
    model, zero = engine._model, engine._engine.optimizer
    gradients: list[int] = []
    model.register_forward_pre_hook(lambda *_: gradients.append(gradient_bytes(model, zero)))
    batches = rank_batches(config, context.topology(config.parallel), 0, packed=True)
    totals = StepTotals((100, 100), 128, 1000, 4)
    engine.train_step(batches, totals=totals, lr=1e-3, report=Report.NONE)
    partitions = partitions_of(zero)
    moments = [zero.optimizer.state[p][kind] for p in partitions for kind in ("exp_avg", "exp_avg_sq")]
    allocated = {
        "weights": weight_bytes(model, zero),
        "gradients": gradients[-1],
        "optimizer": held_bytes([*partitions, *moments]),
    }
    layout = Layout.of(config, context.world_size)
    memory = memory_per_gpu(config.model, layout)
    counted = {part: memory[part] for part in allocated}
    if layout.offload_optimizer:
        allocated |= {"optimizer": 0, "host": allocated["optimizer"] + host_bytes(zero)}
        counted["host"] = host_bytes_per_gpu(config.model, layout)
    if context.rank == 0:
        Path(report).write_text(json.dumps({"allocated": allocated, "counted": counted}))
