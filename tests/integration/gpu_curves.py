"""Curves of whole runs on GPUs, from processes that are started once: a start takes longer than such a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch

from tests.architecture.tree import ROOT
from tests.integration.launching import arguments, environment, write_corpus

# Sizes that the CUDA kernels take, and single rows, for as many ranks as there are rows in a step.
ON_CUDA = {
    "run__micro_batch_size": 1,
    "run__device": "cuda",
    "run__precision": "bf16",
    "model__hidden_size": 128,
    "model__linear_key_head_dim": 128,
    "model__linear_value_head_dim": 128,
    "model__head_dim": 64,
    "model__moe_intermediate_size": 64,
    "model__shared_expert_intermediate_size": 64,
}
STEPS = 12


def losses_of(
    folder: Path, runs: Mapping[str, tuple[int, Mapping[str, object]]], **shared: object
) -> dict[str, list[float]]:
    """``loss/lm`` of every step by run, as many runs at a time as there are GPUs for.

    Args:
        folder: for corpus and runs.
        runs: GPUs and overrides by name; overrides use ``__`` for the dot. Those of more GPUs than there are are
            left out.
        shared: overrides of all.
    """
    num_gpus = torch.cuda.device_count()
    # The processes get the path of the one that starts them.
    with patch("sys.path", [str(ROOT / "scripts" / "benchmarks"), *sys.path]):
        from curve_training import Part, Training, train_all

        command = arguments(write_corpus(folder), folder, **{**ON_CUDA, **shared})
        trainings = [
            Training(name, 1234, (Part(needed, _pairs(overrides)),), folder / name)
            for name, (needed, overrides) in runs.items()
            if needed <= num_gpus
        ]
        with patch.dict(os.environ, environment(), clear=True):
            list(train_all(trainings, command, steps=STEPS, num_gpus=num_gpus, folder=folder))
    assert [training.error for training in trainings if training.error] == []
    rows = {each.name: (each.directory / "metrics.jsonl").read_text().splitlines() for each in trainings}
    return {name: [json.loads(line)["loss/lm"] for line in lines] for name, lines in rows.items()}


def _pairs(overrides: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((key.replace("__", "."), str(value)) for key, value in overrides.items())
