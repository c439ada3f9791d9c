"""Builds a ``loop.Run`` from configuration and process context; holds no logic of training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager, VerifiedCheckpoint
from qwen3next_train.checkpoint.manifest import Header, WorldLayout
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.data.loader import StepLoader, TrainingData
from qwen3next_train.data.prepare import PreparedData, prepare_stores
from qwen3next_train.data.validation import ValidationData
from qwen3next_train.engine.base import Engine
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.kernels.selection import DTYPES, select_kernels, summarize_choices
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.step_line import labelled
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.metrics.wandb_sink import new_run_id
from qwen3next_train.parallel.process_groups import ProcessContext, first_on_each_node
from qwen3next_train.parameters import parameter_table
from qwen3next_train.selftest.at_startup import checks_meanwhile, reject_wrong_gated_delta_net
from qwen3next_train.topology import Topology
from qwen3next_train.train.initial_weights import InitialWeights, find_initial_weights
from qwen3next_train.train.loop import Run
from qwen3next_train.train.memory_check import check_memory
from qwen3next_train.train.opening import opened_with, opening_lines
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.seeding import fix_cpu_threads, seed_everything, use_deterministic_kernels
from qwen3next_train.train.signals import StopRequest
from qwen3next_train.train.sinks import open_sinks, peak_flops
from qwen3next_train.versions import software_versions


@dataclass(frozen=True)
class _Restored:
    """Where a run starts.

    Args:
        state: progress of the checkpoint, or of a new run.
        found: the checkpoint, None for a new run.
        initial: weights a new run starts from, None for random ones.
    """

    state: TrainState
    found: VerifiedCheckpoint | None
    initial: InitialWeights | None


def build_run(
    config: Config, context: ProcessContext, run_dir: RunDirectory, stop: StopRequest, stack: ExitStack
) -> Run:
    """Prepare data, find the newest checkpoint, build model and engine, restore.

    What can be rejected is rejected before the model is built, wrong kernels right after it.

    Args:
        config: the resolved configuration.
        context: this process among the others.
        run_dir: the opened run directory.
        stop: signals received.
        stack: takes what has to be closed at the end of the attempt.

    Raises:
        TrainError: one line for everything that speaks against the attempt.
    """
    validate_for_world(config, context.world_size)
    check_memory(config, context)
    topology = Topology(context.world_size, context.rank, config.parallel.expert_parallel_size)
    num_threads = fix_cpu_threads(context.local_world_size)
    seed_everything(config.run.seed)
    use_deterministic_kernels(context.device)
    with opened_with(opening_lines(config, world_size=context.world_size, device=context.device)):
        prepared = first_on_each_node(context, lambda: prepare_stores(config))
        checkpoints = CheckpointManager(run_dir.checkpoints_path, control=context.control, keep=config.checkpoint.keep)
        restored = _restore_state(config, checkpoints, prepared, run_dir, context)
        samples = TrainingData(prepared, config)
        validation = ValidationData(prepared, config, num_rows=config.eval.rows) if config.eval.interval else None
    engine = _build_engine(config, topology, context, checkpoints, restored)
    loader = stack.enter_context(
        StepLoader(
            samples,
            topology=topology,
            global_batch_size=config.run.global_batch_size,
            micro_batch_size=config.run.micro_batch_size,
            mtp_depths=config.model.mtp_num_layers,
            start_sample=restored.state.consumed_samples,
            num_prefetch_steps=config.data.num_prefetch_steps,
        )
    )
    throughput = Throughput(
        peak_flops(config, context.device), context.world_size, flops_total=restored.state.flops_total
    )
    layout = {"world_size": context.world_size, "cpu_threads": num_threads, **config.parallel.model_dump()}
    sinks = open_sinks(config, context, run_dir, restored.state, throughput, layout, stack)
    return Run(
        config=config,
        control=context.control,
        engine=engine,
        batches=loader,
        data_wait_s=lambda: loader.last_wait_s,
        validation=_validation_batches(validation, config, topology),
        bytes_per_token=None if validation is None else validation.bytes_per_token,
        checkpoints=checkpoints,
        header=_header(config, context),
        state=restored.state,
        sinks=sinks.sinks,
        progress=sinks.progress,
        sync_metrics=sinks.sync_metrics,
        throughput=throughput,
        stop=stop,
    )


def _restore_state(
    config: Config,
    checkpoints: CheckpointManager,
    prepared: PreparedData,
    run_dir: RunDirectory,
    context: ProcessContext,
) -> _Restored:
    """Progress of the newest checkpoint, rejected when it belongs to another configuration or other data."""
    # Before a terabyte is verified for nothing, as if there were a checkpoint of the first step; what depends on the
    # step is looked at again below.
    recorded = run_dir.read_config()
    if recorded is not None:
        _check_same_configuration(run_dir, recorded, config, step=1)
    found = checkpoints.find_latest()
    if found is None:
        if recorded is not None:
            _check_same_configuration(run_dir, recorded, config, step=0)
        wandb_id: str = context.control.broadcast_json(run_dir.read_info().get("wandb_id") or new_run_id())
        new = TrainState(
            step=0,
            consumed_samples=0,
            consumed_tokens=0,
            flops_total=0,
            skipped_steps=0,
            optimizer_step=0,
            data_fingerprint=prepared.fingerprint,
            wandb_id=wandb_id,
        )
        return _Restored(new, None, find_initial_weights(config, context.control))
    state = found.manifest.train_state
    _check_same_configuration(run_dir, found.manifest.config, config, step=found.step)
    if state.data_fingerprint != prepared.fingerprint:
        labels = ", ".join(source.label for source in prepared.train[:3])
        more = f" and {len(prepared.train) - 3} more" if len(prepared.train) > 3 else ""
        raise DataError(
            f"run.dir: {found.path}: the training data ({labels}{more}) is not what the run started with; "
            "restore the data or choose another run.dir"
        )
    return _Restored(state, found, None)


def _check_same_configuration(run_dir: RunDirectory, recorded: Mapping[str, Any], config: Config, *, step: int) -> None:
    """Raise when ``config`` would not continue the curve that ``recorded`` has begun in the directory."""
    changes = compare_configs(recorded, config, step=step)
    decisive = [*changes.shape, *changes.trajectory]
    if decisive:
        listed = ", ".join(f"{change.key} was {change.old}, now {change.new}" for change in decisive[:3])
        more = f", and {len(decisive) - 3} more" if len(decisive) > 3 else ""
        raise ConfigError(
            f"run.dir: {run_dir.path} belongs to another configuration ({listed}{more}); "
            "go on with that configuration or choose another run.dir"
        )


def _build_engine(
    config: Config,
    topology: Topology,
    context: ProcessContext,
    checkpoints: CheckpointManager,
    restored: _Restored,
) -> Engine:
    """Model and optimizer, with the state of the checkpoint or the weights to start from, if there are any."""
    dtype = DTYPES[config.run.precision]
    kernels = select_kernels(config.kernels, context.device, dtype=dtype, model=config.model)
    # Imported here: DeepSpeed picks its accelerator on import, which the process context has just decided. Not beside
    # the checks: of two threads that import from both ends of a circle, one may be given a module that is half loaded.
    from qwen3next_train.engine.zero_engine import ZeroEngine

    with checks_meanwhile(kernels, config.model, context.device, dtype) as checks:
        engine = ZeroEngine(
            config,
            topology=topology,
            kernels=kernels,
            device=context.device,
            num_micro_batches=config.run.global_batch_size // config.run.micro_batch_size // context.world_size,
        )
    reject_wrong_gated_delta_net(checks(), context.control)
    if restored.found is not None:
        reader = FragmentReader(restored.found.path, restored.found.manifest)
        reader.check_parameters(parameter_table(config.model))
        engine.load_state(reader.read, restored.state.optimizer_step)
        checkpoints.restore_rng(restored.found, reader)
        get_logger().info("resumed from step %d: %s", restored.found.step, restored.found.path)
        _log_other_moments(restored.found.manifest.config, config)
        if config.checkpoint.init_from:
            get_logger().info("checkpoint.init_from is not read: run.dir has a checkpoint")
    elif restored.initial is not None:
        # New moments count as at update 0, so Adam's bias correction starts over.
        engine.load_state(restored.initial.read, 0)
        get_logger().info("new run with the weights of %s", restored.initial.path)
    get_logger().info("%s", labelled("kernels", summarize_choices(kernels.choices)))
    return engine


def _log_other_moments(recorded: Mapping[str, Any], config: Config) -> None:
    """Say that the moments are kept in another dtype than before the resume: the curve goes on, not bit for bit."""
    for change in compare_configs(recorded, config).harmless:
        if change.key == "optimizer.moments_dtype":
            get_logger().info("%s was %s, now %s: the moments go on in it", change.key, change.old, change.new)


def _validation_batches(validation: ValidationData | None, config: Config, topology: Topology) -> list[PackedBatch]:
    if validation is None:
        return []
    return validation.batches(
        topology, micro_batch_size=config.run.micro_batch_size, mtp_depths=config.model.mtp_num_layers
    )


def _header(config: Config, context: ProcessContext) -> Header:
    parallel = config.parallel
    layout = WorldLayout(
        world_size=context.world_size,
        expert_parallel_size=parallel.expert_parallel_size,
        zero_stage=parallel.zero_stage,
    )
    versions = {name: version for name, version in software_versions().items() if version is not None}
    return Header(parameter_table(config.model), config.model_dump(mode="json"), layout, versions)
