"""Builds a ``loop.Run`` from configuration and process context; holds no logic of training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.checkpoint.background import BackgroundSaver
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.checkpoint.manifest import Header, WorldLayout
from qwen3next_train.config.batch_size import batch_sizes_after
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.error_lines import show_stored
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import validate_for_world
from qwen3next_train.data.loader import StepLoader, TrainingData
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.summary import data_as_json, log_data
from qwen3next_train.data.validation import open_validation
from qwen3next_train.engine.base import Engine
from qwen3next_train.imports import imported_to_stay
from qwen3next_train.kernels.choices import summarize_choices
from qwen3next_train.kernels.selection import DTYPES, select_kernels
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.step_line import labelled
from qwen3next_train.metrics.throughput import Throughput
from qwen3next_train.parallel.process_groups import ProcessContext, first_on_each_node
from qwen3next_train.parameters import parameter_table
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.selftest.at_startup import checks_meanwhile, reject_wrong_gated_delta_net
from qwen3next_train.topology import Topology
from qwen3next_train.train.disk_check import warn_of_small_disk
from qwen3next_train.train.loop import Run
from qwen3next_train.train.memory_check import check_memory, has_host_room
from qwen3next_train.train.opening import opened_with, opening_lines
from qwen3next_train.train.profiling import open_profiler
from qwen3next_train.train.restore import Restored, restore_state
from qwen3next_train.train.resume import NEWEST, Resume
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.samples import EncodedPrompts, TrainingSamples
from qwen3next_train.train.seeding import fix_cpu_threads, seed_everything, use_deterministic_kernels
from qwen3next_train.train.signals import StopRequest
from qwen3next_train.train.sinks import open_sinks, peak_flops
from qwen3next_train.train.validation import validation_sets, without_other_rows
from qwen3next_train.versions import software_versions


def build_run(
    config: Config,
    context: ProcessContext,
    run_dir: RunDirectory,
    stop: StopRequest,
    stack: ExitStack,
    resume: Resume = NEWEST,
) -> Run:
    """Prepare data, find the checkpoint to go on from, build model and engine, restore.

    What can be rejected is rejected before the model is built, wrong kernels right after it.

    Args:
        config: the resolved configuration.
        context: this process among the others.
        run_dir: the opened run directory.
        stop: signals received.
        stack: takes what has to be closed at the end of the attempt.
        resume: which checkpoint to go on from, and what may differ from it.

    Raises:
        TrainError: one line for everything that speaks against the attempt.
    """
    validate_for_world(config, context.world_size)
    layout = Layout.of(config, context.world_size, ranks_per_node=context.ranks_per_node)
    check_memory(config, layout, context)
    topology = context.topology(config.parallel)
    part = RowSlice.of(topology, config.model)
    num_threads = fix_cpu_threads(context.local_world_size)
    seed_everything(config.run.seed)
    use_deterministic_kernels(context.device)
    with opened_with(opening_lines(config, layout, context.device)):
        prompts = EncodedPrompts.of(config)
        prepared = first_on_each_node(context, lambda: prepare_stores(config))
        checkpoints = CheckpointManager(
            run_dir.checkpoints_path,
            control=context.saving,
            keep=config.checkpoint.keep,
            best=config.checkpoint.best,
        )
        restored = restore_state(config, checkpoints, prepared, run_dir, context.control, resume)
        # Also where no save will follow: a run killed behind its last one has nothing left to do.
        checkpoints.remove_unfinished()
        if context.rank == 0:
            warn_of_small_disk(config, run_dir.checkpoints_path)
        samples = TrainingData(prepared, config, restored.data)
        log_data(prepared, config)
        validation = validation_sets(open_validation(prepared, config), config, topology, part)
    engine = _build_engine(config, topology, context, checkpoints, restored)
    loader = stack.enter_context(
        StepLoader(
            samples,
            topology=topology,
            batch_sizes=batch_sizes_after(config, restored.state.step),
            micro_batch_size=config.run.micro_batch_size,
            mtp_depths=config.model.mtp_num_layers,
            start_sample=restored.state.consumed_samples,
            num_prefetch_steps=config.data.num_prefetch_steps,
            part=part,
        )
    )
    throughput = Throughput(
        peak_flops(config, context.device), context.world_size, flops_total=restored.state.flops_total
    )
    processes = {"world_size": context.world_size, "cpu_threads": num_threads, **config.parallel.model_dump()}
    data = data_as_json(prepared, config)
    validation_rows = {each.prefix: each.rows for each in validation}
    sinks = open_sinks(config, context, run_dir, restored, throughput, processes, data, validation_rows, stack)
    profiler = open_profiler(config, context, run_dir.path, first_step=restored.state.step + 1)
    if profiler is not None:
        stack.callback(profiler.close)
    return Run(
        config=config,
        control=context.control,
        engine=engine,
        batches=loader,
        data_wait_s=lambda: loader.last_wait_s,
        validation=validation,
        checkpoints=checkpoints,
        background=BackgroundSaver(
            checkpoints,
            control=context.control,
            device=context.device,
            enabled=config.checkpoint.async_save,
            has_room=lambda num_bytes: has_host_room(num_bytes, num_local=context.local_world_size),
        ),
        header=_header(config, context),
        state=without_other_rows(restored.state, validation),
        sinks=sinks.sinks,
        progress=sinks.progress,
        sync_metrics=sinks.sync_metrics,
        require_directory=run_dir.require_same,
        record_save=sinks.record_save,
        throughput=throughput,
        stop=stop,
        profiler=profiler,
        samples=None if prompts is None else TrainingSamples(config, prompts, engine, sinks.log_samples),
    )


def _build_engine(
    config: Config,
    topology: Topology,
    context: ProcessContext,
    checkpoints: CheckpointManager,
    restored: Restored,
) -> Engine:
    """Model and optimizer, with the state of the checkpoint or the weights to start from, if there are any."""
    dtype = DTYPES[config.run.precision]
    kernels = select_kernels(config.kernels, context.device, dtype=dtype, model=config.model)
    # Imported here: DeepSpeed picks its accelerator on import, which the process context has just decided. Not beside
    # the checks: of two threads that import from both ends of a circle, one may be given a module that is half loaded.
    with imported_to_stay():
        from qwen3next_train.engine.step_clock import StepClock
        from qwen3next_train.engine.zero_engine import ZeroEngine

    passes_state = topology.context_parallel_size > 1
    with checks_meanwhile(kernels, config.model, context.device, dtype, passes_state=passes_state) as checks:
        engine = ZeroEngine(
            config,
            topology=topology,
            kernels=kernels,
            device=context.device,
            num_micro_batches=config.run.global_batch_size
            // config.run.micro_batch_size
            // topology.data_parallel_size,
            clock=StepClock(context.device) if config.logging.step_parts else None,
        )
    reject_wrong_gated_delta_net(checks(), context.control)
    if (found := restored.found) is not None:
        started_at = time.monotonic()
        reader = FragmentReader(found.path, found.manifest)
        reader.check_parameters(parameter_table(config.model))
        engine.load_state(reader.read, restored.state.optimizer_step)
        checkpoints.restore_rng(found, reader)
        read_s = time.monotonic() - started_at
        get_logger().info("resumed from step %d: %s, read in %.1f s", found.step, found.path, read_s)
        _log_other_moments(found.manifest.config, config)
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
            get_logger().info(
                "%s was %s, now %s: the moments go on in it", change.key, show_stored(change.old), change.new
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
