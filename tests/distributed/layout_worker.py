"""Train a few steps at the layout torchrun gives, and write losses and the full training state.

Run as ``torchrun --nproc-per-node N -m tests.distributed.layout_worker CONFIG.json OUT``; ``OUT`` receives
``metrics.json`` and one ``rank_<r>.pt`` of plain tensors per rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.optim.schedule import learning_rate
from qwen3next_train.parallel.process_groups import process_context
from qwen3next_train.topology import Topology


def make_row(sample: int, *, length: int, vocab_size: int, packed: bool) -> PackedRow:
    """Random tokens and random document cuts, a function of the sample's number."""
    generator = np.random.default_rng(sample)
    cuts = np.flatnonzero(generator.random(length - 1) < 0.08) + 1 if packed else np.array([], dtype=np.int64)
    boundaries = np.concatenate([[0], cuts, [length]])
    # A Markov-like structure, so that a few steps have something to learn.
    tokens = (generator.integers(0, 7, length + 1).cumsum() * 3) % vocab_size
    return PackedRow(tokens, boundaries, bool(generator.random() < 0.5))


def rank_batches(config: Config, topology: Topology, step: int, *, packed: bool) -> list[PackedBatch]:
    """This rank's micro-batches of a step."""
    micro, per_step = config.run.micro_batch_size, config.run.global_batch_size
    per_rank = per_step // topology.world_size
    first = step * per_step + topology.rank * per_rank
    make = [
        make_row(sample, length=config.data.sequence_length, vocab_size=config.model.vocab_size, packed=packed)
        for sample in range(first, first + per_rank)
    ]
    depths = config.model.mtp_num_layers
    return [PackedBatch.from_rows(make[i : i + micro], mtp_depths=depths) for i in range(0, per_rank, micro)]


def main(config_path: Path, out: Path) -> None:
    """Train ``run.steps`` steps and write what came of it."""
    options = json.loads(config_path.read_text())
    config = Config.model_validate(options["config"])
    torch.set_num_threads(1)
    with process_context("cpu") as context:
        from qwen3next_train.engine.deepspeed_engine import DeepSpeedEngine
        from qwen3next_train.kernels.selection import select_kernels

        topology = Topology(context.world_size, context.rank, config.parallel.expert_parallel_size)
        accumulation = config.run.global_batch_size // config.run.micro_batch_size // context.world_size
        engine = DeepSpeedEngine(
            config,
            topology=topology,
            kernels=select_kernels(config.kernels, context.device),
            device=context.device,
            num_micro_batches=accumulation,
        )
        metrics = []
        for step in range(config.run.steps):
            batches = rank_batches(config, topology, step, packed=options["packed"])
            totals = StepTotals.over_ranks(batches, context.control.sum_ints)
            lr = learning_rate(config, step + 1)
            metrics.append(engine.train_step(batches, totals=totals, lr=lr, report=Report.SUMMARY).metrics)
        state = [(f.name, f.start, {kind: t.clone() for kind, t in f.tensors.items()}) for f in engine.fragments()]
        torch.save(state, out / f"rank_{context.rank}.pt")
        if context.rank == 0:
            (out / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
