"""What the log opens with: the model, the work, the layout and where the results go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import memory_per_gpu
from qwen3next_train.accounting.workload import workload_of
from qwen3next_train.config.batch_size import describe_rampup, samples_through
from qwen3next_train.config.schema import Config
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.step_line import format_si, labelled

_GIB = 2**30


@contextmanager
def opened_with(lines: Sequence[str]) -> Iterator[None]:
    """Log ``lines`` before the first thing that is logged inside, at the latest at its end.

    Unless that is an error, or an error ends it before: a start that is rejected is one line.
    """
    left = list(lines)

    def log_first(record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            log()
        return True

    def log() -> None:
        # Emptied first: what is logged here comes by here as well.
        pending = left.copy()
        left.clear()
        for line in pending:
            get_logger().info("%s", line)

    get_logger().addFilter(log_first)
    try:
        yield
        log()
    finally:
        get_logger().removeFilter(log_first)


def opening_lines(config: Config, layout: Layout, device: torch.device) -> list[str]:
    """The plan of a run in a few lines, known before data and model are.

    Args:
        config: the resolved configuration, which fits the world size.
        layout: how it is spread.
        device: where this process trains.
    """
    run, work = config.run, workload_of(config)
    rampup = describe_rampup(config)
    num_tokens = samples_through(config, run.steps) * config.data.sequence_length
    num_micro_batches = layout.num_micro_batches(run.global_batch_size)
    lines = [
        labelled("model", f"{work.parameters.total:,} parameters, {work.parameters.active:,} active per token"),
        labelled(
            "step",
            f"{run.global_batch_size:,} x {config.data.sequence_length:,} = {work.num_tokens:,} tokens, "
            f"{format_si(work.flops_per_step)}FLOP; {num_micro_batches:,} x {run.micro_batch_size:,} rows a process",
        ),
        *([labelled("ramp-up", rampup)] if rampup else []),
        labelled(
            "run",
            f"{run.steps:,} steps = {format_si(num_tokens).strip()} tokens, "
            f"{format_si(num_tokens * work.flops_per_token)}FLOP",
        ),
        labelled("layout", _layout(config, layout, device)),
    ]
    if device.type == "cuda":
        planned = sum(memory_per_gpu(config.model, layout).values())
        held = torch.cuda.get_device_properties(device).total_memory
        lines.append(labelled("memory", f"{planned / _GIB:.1f} GiB planned of {held / _GIB:.1f} GiB a GPU"))
    interval = config.checkpoint.interval
    when = f"every {interval:,} steps" if interval else "at the end"
    return [*lines, labelled("output", f"{run.dir}, a checkpoint {when}")]


def _layout(config: Config, layout: Layout, device: torch.device) -> str:
    parallel, world_size = config.parallel, layout.world_size
    heads = parallel.tensor_parallel_size
    kind = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    parts = [
        f"{world_size:,} {'process' if world_size == 1 else 'processes'} on {kind}",
        config.run.precision,
        f"ZeRO-{parallel.zero_stage}",
    ]
    if parallel.expert_parallel_size > 1:
        exchange = "dense" if layout.exchanges_densely else "exact"
        parts.append(f"experts over {parallel.expert_parallel_size} ranks, {exchange} exchange")
    if parallel.context_parallel_size > 1:
        parts.append(f"rows over {parallel.context_parallel_size} {'ranks' if heads == 1 else 'groups'}")
    if heads > 1:
        parts.append(f"heads over {heads} ranks")
    if parallel.micro_batches_in_flight > 1:
        parts.append(f"{parallel.micro_batches_in_flight} micro-batches in flight")
    if parallel.recompute:
        parts.append(f"recompute {' + '.join(parallel.recompute)}")
    if parallel.offload_optimizer != "none":
        parts.append("optimizer in host memory")
    return ", ".join(parts)
