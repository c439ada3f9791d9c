"""Train a few steps at a layout, and write losses and the full training state.

A task of :mod:`tests.distributed.ranks` whose argument names a file: a list of ``{config, packed, load, save, out,
first_sample}``, one training each, one after the other. ``load`` and ``save`` are checkpoint
directories or empty; training starts at the step of the checkpoint. A job that loads goes on in the engine of the one
before if that has the same configuration but for the number of steps: all state comes from the checkpoint. Each folder
``out`` receives ``metrics.json`` and ``margins.json`` of the steps trained and, per rank, this rank's elements of the
state, ``rank_<r>.safetensors``, and those right after loading, ``loaded_<r>.safetensors`` (:func:`read_state`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.checkpoint.manifest import Header, WorldLayout
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Engine, Report, StepTotals
from qwen3next_train.held_elements import Runs
from qwen3next_train.model.moe import TopKRouter
from qwen3next_train.optim.schedule import learning_rate
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.parameters import parameter_table
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.topology import Topology
from tests.distributed.engine import build_engine

NUM_SOURCES = 3
"""From which rows come in turn."""
KINDS = ("master", "exp_avg", "exp_avg_sq")
"""Of the state."""


def make_row(sample: int, *, length: int, vocab_size: int, packed: bool) -> PackedRow:
    """Random tokens and random document cuts, a function of the sample's number."""
    generator = np.random.default_rng(sample)
    cuts = np.flatnonzero(generator.random(length - 1) < 0.08) + 1 if packed else np.array([], dtype=np.int64)
    boundaries = np.concatenate([[0], cuts, [length]])
    # A Markov-like structure, so that a few steps have something to learn.
    tokens = (generator.integers(0, 7, length + 1).cumsum() * 3) % vocab_size
    return PackedRow(tokens, boundaries, bool(generator.random() < 0.5), source=sample % NUM_SOURCES)


def rank_batches(
    config: Config, topology: Topology, step: int, *, packed: bool, first_sample: int = 0
) -> list[PackedBatch]:
    """This rank's micro-batches of a step."""
    micro, per_step = config.run.micro_batch_size, config.run.global_batch_size
    per_rank = per_step // topology.data_parallel_size
    first = first_sample + step * per_step + topology.data_parallel_rank * per_rank
    make = [
        make_row(sample, length=config.data.sequence_length, vocab_size=config.model.vocab_size, packed=packed)
        for sample in range(first, first + per_rank)
    ]
    depths = config.model.mtp_num_layers
    part = RowSlice.of(topology, config.model)
    return [PackedBatch.from_rows(make[i : i + micro], mtp_depths=depths).cut(part) for i in range(0, per_rank, micro)]


def watch_margins(model: nn.Module) -> list[float]:
    """A list that receives, at every pass through a router, the narrowest decision between chosen and not chosen.

    In logits, which differ between layouts by rounding: what hangs on less than that may be decided either way.
    """
    margins: list[float] = []

    def note(router: nn.Module, inputs: tuple[torch.Tensor, int], outputs: object) -> None:
        assert isinstance(router, TopKRouter)
        logits_TE = F.linear(inputs[0].detach().float(), router.weight.detach())
        best = logits_TE.topk(router.top_k + 1, dim=-1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(note)
    return margins


def train(engine: Engine, decisions: list[float], config: Config, context: ProcessContext, job: dict[str, Any]) -> None:
    """Train up to step ``run.steps`` and write what came of it.

    Args:
        engine: built for ``config``.
        decisions: list that :func:`watch_margins` made for its model.
        config: the resolved configuration.
        context: this rank.
        job: see the module.
    """
    topology = context.topology(config.parallel)
    out = Path(job["out"])
    first = 0
    if job["load"]:
        first = _load(engine, job["load"], context)
        _write_state(engine, out / f"loaded_{context.rank}.safetensors")
    margins: list[float] = []
    metrics = []
    for step in range(first, config.run.steps):
        batches = rank_batches(config, topology, step, packed=job["packed"], first_sample=job["first_sample"])
        totals = StepTotals.over_ranks(batches, context.control.sum_ints)
        lr = learning_rate(config, step + 1)
        result = engine.train_step(batches, totals=totals, lr=lr, report=Report.SUMMARY)
        metrics.append(result.metrics)
        margins += [min(decisions)] if decisions else []
        decisions.clear()
    if job["save"]:
        _save(engine, job["save"], config, context)
    _write_state(engine, out / f"rank_{context.rank}.safetensors")
    if context.rank == 0:
        (out / "metrics.json").write_text(json.dumps(metrics))
        (out / "margins.json").write_text(json.dumps(margins))


def _write_state(engine: Engine, path: Path) -> None:
    fragments = {str(index): fragment for index, fragment in enumerate(engine.fragments())}
    places = {index: json.dumps([fragment.name, vars(fragment.runs)]) for index, fragment in fragments.items()}
    tensors = {
        f"{index} {kind}": tensor.contiguous()
        for index, fragment in fragments.items()
        for kind, tensor in fragment.tensors.items()
    }
    save_file(tensors, path, metadata=places)


def read_state(path: Path) -> Iterator[tuple[str, Runs, dict[str, torch.Tensor]]]:
    """Fragments that a rank wrote: parameter, place in it, and elements by kind."""
    with safe_open(path, framework="pt") as file:
        for index, place in file.metadata().items():
            name, runs = json.loads(place)
            yield name, Runs(**runs), {kind: file.get_tensor(f"{index} {kind}") for kind in KINDS}


def _load(engine: Engine, directory: str, context: ProcessContext) -> int:
    """Take the newest checkpoint; its step."""
    found = CheckpointManager(Path(directory), control=context.control, keep=1).find_latest()
    assert found is not None
    reader = FragmentReader(found.path, found.manifest)
    engine.load_state(reader.read, found.manifest.train_state.optimizer_step)
    return found.step


def _save(engine: Engine, directory: str, config: Config, context: ProcessContext) -> None:
    steps = config.run.steps
    parallel = config.parallel
    layout = WorldLayout(
        world_size=context.world_size,
        expert_parallel_size=parallel.expert_parallel_size,
        zero_stage=parallel.zero_stage,
    )
    CheckpointManager(Path(directory), control=context.control, keep=1).save(
        step=steps,
        fragments=engine.fragments(),
        train_state=TrainState(
            step=steps,
            consumed_samples=0,
            consumed_tokens=0,
            flops_total=0,
            skipped_steps=0,
            optimizer_step=steps,
            data_fingerprint="",
        ),
        rank_tensors={},
        header=Header(parameter_table(config.model), config.model_dump(mode="json"), layout, {}),
    )


def perform(context: ProcessContext, jobs_path: str) -> None:
    """Do one job after the other."""
    built_for = None
    for job in json.loads(Path(jobs_path).read_text()):
        config = Config.model_validate(job["config"])
        # The schedule is constant: the engine does not ask where training ends.
        needed = config.model_copy(update={"run": config.run.model_copy(update={"steps": 1})})
        if needed != built_for or not job["load"]:
            engine, built_for = build_engine(config, context), needed
            # To look at them takes every rank time; all ranks decide as one alone does, or their curves differ.
            decisions = watch_margins(engine._model) if context.world_size == 1 else []
        train(engine, decisions, config, context, job)
