"""Where a run's records go, and what the loop tells those places besides records."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.accounting.hardware import find_device
from qwen3next_train.accounting.workload import workload_of
from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, describe_os_error
from qwen3next_train.checkpoint.names import list_checkpoints
from qwen3next_train.checkpoint.publication import set_aside
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.console import ConsoleSink
from qwen3next_train.metrics.history import Row, keep_aside
from qwen3next_train.metrics.samples import Sample, SampleSink, samples_row, say_samples
from qwen3next_train.metrics.sinks import JsonlSink, Sink
from qwen3next_train.metrics.summary import SummarySink
from qwen3next_train.metrics.tensorboard_sink import FOLDER_NAME, TensorBoardSink
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.metrics.wandb_sink import WandbSink
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.train.restore import Restored, due_steps
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.run_info import ValidatedRows
from qwen3next_train.train.start import start_record
from qwen3next_train.versions import software_versions

LogSamples = Callable[[int, Sequence[Sample]], None]
"""Takes a step and its samples."""


@dataclass(frozen=True)
class RunSinks:
    """Rank 0's destinations of records, and what the loop tells them besides records."""

    sinks: tuple[Sink, ...]
    log_samples: LogSamples
    progress: Callable[[int], None]
    sync_metrics: Callable[[], None]
    record_save: Callable[[int], None]


def open_sinks(
    config: Config,
    context: ProcessContext,
    run_dir: RunDirectory,
    restored: Restored,
    throughput: Throughput,
    layout: dict[str, int],
    data: list[dict[str, Any]],
    validation_rows: Mapping[str, str],
    stack: ExitStack,
) -> RunSinks:
    """Rank 0's destinations of records, in the order they are told.

    Args:
        config: the resolved configuration.
        context: this process.
        run_dir: the opened run directory.
        restored: where the attempt starts.
        throughput: knows how long the rest takes.
        layout: the world, for ``run.json``.
        data: what ``run.json`` says of sources.
        validation_rows: digests of the rows that are validated on, by the prefix of their metrics.
        stack: takes what has to be closed.
    """
    if context.rank != 0:
        return RunSinks((), lambda step, samples: None, lambda step: None, lambda: None, lambda step: None)
    state = restored.state
    info = run_dir.read_info()
    resumed_wandb = info.get("wandb_id") == state.wandb_id
    workload = workload_of(config).as_json()
    summary = SummarySink(
        run_dir.metrics_path,
        first_step=state.step,
        total_steps=config.run.steps,
        newest_checkpoint=lambda: _newest_checkpoint(run_dir),
    )
    if isinstance(restored.start, int):
        _keep_aside(run_dir, restored.start)
    metrics = _open_metrics(run_dir, restored, validation_rows, summary)
    stack.callback(metrics.close)
    samples_file = _open_samples(config, run_dir, state.step, stack)
    run_dir.record_attempt(
        config,
        layout=layout,
        workload=workload | {"data": data},
        wandb_id=state.wandb_id,
        command=sys.argv,
        step=state.step,
        forked=isinstance(restored.start, Path),
        start=None if restored.start is None else start_record(restored.start, config),
        changes=[asdict(change) for change in state.changes],
        validation_rows=validation_rows,
    )
    console = ConsoleSink(
        total_steps=config.run.steps,
        first_step=state.step,
        eta_s=throughput.eta_s,
        rate_unit=_rate_unit(context),
    )
    wandb = WandbSink(
        config.logging.wandb,
        run_dir.path,
        config.model_dump(mode="json") | {"versions": software_versions(), "layout": layout} | workload,
        state.wandb_id,
        resumed=resumed_wandb,
    )
    if restored.changes:
        wandb.note(state.step, "; ".join(f"{each.key}: {each.old} -> {each.new}" for each in restored.changes))

    tensorboard: list[TensorBoardSink] = []
    if config.logging.tensorboard:
        tensorboard.append(TensorBoardSink(run_dir.path / FOLDER_NAME, resume_step=state.step))
        stack.callback(tensorboard[0].close)

    def advance(step: int) -> None:
        console.advance(step)
        summary.advance(step)

    def log_samples(step: int, samples: Sequence[Sample]) -> None:
        say_samples(step, samples)
        if samples_file is not None:
            samples_file.log(samples_row(step, samples))
        destinations: tuple[SampleSink, ...] = (wandb, *tensorboard)
        for destination in destinations:
            destination.log_samples(step, samples)

    def sync() -> None:
        metrics.sync()
        if samples_file is not None:
            samples_file.sync()

    stack.callback(summary.close)
    stack.callback(console.close)
    stack.push(lambda kind, error, trace: wandb.close(failed=kind is not None))
    sinks: tuple[Sink, ...] = (metrics, console, summary, wandb, *tensorboard)
    return RunSinks(sinks, log_samples, advance, sync, run_dir.record_save)


def _open_metrics(
    run_dir: RunDirectory, restored: Restored, validation_rows: Mapping[str, str], summary: SummarySink
) -> JsonlSink:
    """``metrics.jsonl``, cut to where the run goes on; the summary is told of what stays and compares with now."""
    info, step = run_dir.read_info(), restored.state.step
    own = {"first_step": step, "validation_rows": validation_rows}
    rows = ValidatedRows([*info.get("attempts", []), own])

    def take_earlier(row: Row) -> None:
        summary.take_earlier({name: value for name, value in row.items() if rows.compares(name, row["step"])})

    return JsonlSink(run_dir.metrics_path, resume_step=step, due=due_steps(info, restored), on_kept=take_earlier)


def _open_samples(config: Config, run_dir: RunDirectory, step: int, stack: ExitStack) -> JsonlSink | None:
    """``samples.jsonl``, cut to where the run goes on; None for a run that has none and takes none."""
    if not config.eval.samples.prompts and not os.path.lexists(run_dir.samples_path):
        return None
    samples_file = JsonlSink(run_dir.samples_path, resume_step=step)
    stack.callback(samples_file.close)
    return samples_file


def _keep_aside(run_dir: RunDirectory, step: int) -> None:
    """Keep rows and checkpoints of the steps after ``step`` where no resume looks for them.

    Raises:
        StorageError: they cannot be moved; the same line goes on with it.
    """
    try:
        rows = [keep_aside(path, step) for path in (run_dir.metrics_path, run_dir.samples_path)]
        checkpoints = set_aside(LOCAL_FILESYSTEM, run_dir.checkpoints_path, step)
    except OSError as error:
        raise StorageError(
            f"run.dir: {run_dir.path}: what comes after step {step} cannot be kept aside ({describe_os_error(error)}); "
            "free space or fix permissions, and run the same line again"
        ) from error
    kept = [str(path) for path in (checkpoints, *rows) if path is not None]
    if kept:
        get_logger().info("back at step %d; what came after it is kept as %s", step, " and ".join(kept))


def _rate_unit(context: ProcessContext) -> str:
    """What ``perf/tflops_per_gpu`` counts, which on CPU is a process."""
    if context.device.type == "cuda":
        return "FLOP/s/gpu"
    return "FLOP/s" if context.world_size == 1 else "FLOP/s/rank"


def _newest_checkpoint(run_dir: RunDirectory) -> str | None:
    try:
        found = list_checkpoints([path.name for path in run_dir.checkpoints_path.iterdir()])
    except OSError:
        return None
    return max(found, key=lambda checkpoint: checkpoint.step).name if found else None


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of the device in the training dtype, None where unknown."""
    if device.type != "cuda":
        return None
    known = find_device(torch.cuda.get_device_name(device))
    return None if known is None else known.peak_flops(config.run.precision)
