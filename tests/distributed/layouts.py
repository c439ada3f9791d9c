"""Run the layout worker and put its fragments together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.parameters import parameter_table
from tests.distributed.layout_worker import KINDS, read_state
from tests.distributed.ranks import perform


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Args:
        metrics: by step.
        margins: by step, the narrowest routing decision in logits; empty for more than one rank.
        state: by ``(parameter name, kind)``, all ranks' together, after the last step.
        loaded: the same right after loading; empty for a training that began anew.
    """

    metrics: list[dict[str, float]]
    margins: list[float]
    state: dict[tuple[str, str], torch.Tensor]
    loaded: dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """One training up to step ``run.steps``, on packed or dense rows, from and to a directory of checkpoints.

    ``first_sample`` chooses the rows.
    """

    config: Config
    packed: bool = True
    load: Path | None = None
    save: Path | None = None
    first_sample: int = 0


def train_at(config: Config, folder: Path, *, num_processes: int, packed: bool = True) -> Outcome:
    """Train ``config`` with ``num_processes`` ranks."""
    (outcome,) = train_all([Job(config, packed)], folder, num_processes=num_processes)
    return outcome


def train_all(jobs: Sequence[Job], folder: Path, *, num_processes: int, timeout: float = 280) -> list[Outcome]:
    """Do all jobs in the same processes; every element of the state must be owned exactly once."""
    folder.mkdir()
    outs = [folder / str(index) for index in range(len(jobs))]
    listed = []
    for job, out in zip(jobs, outs, strict=True):
        out.mkdir()
        folders = {"load": str(job.load or ""), "save": str(job.save or ""), "out": str(out)}
        rows = {"packed": job.packed, "first_sample": job.first_sample}
        listed.append({"config": job.config.model_dump(), **rows, **folders})
    (folder / "jobs.json").write_text(json.dumps(listed))
    perform("layout_worker", folder / "jobs.json", num_processes=num_processes, timeout=timeout)
    return [_read(job, out, num_processes) for job, out in zip(jobs, outs, strict=True)]


def _read(job: Job, out: Path, num_processes: int) -> Outcome:
    return Outcome(
        json.loads((out / "metrics.json").read_text()),
        json.loads((out / "margins.json").read_text()),
        _assembled(job.config, out, "rank", num_processes),
        _assembled(job.config, out, "loaded", num_processes) if job.load else {},
    )


def _assembled(config: Config, out: Path, prefix: str, num_processes: int) -> dict[tuple[str, str], torch.Tensor]:
    sizes = {spec.name: spec.numel for spec in parameter_table(config.model)}
    state = {(name, kind): torch.full((size,), torch.nan) for name, size in sizes.items() for kind in KINDS}
    owned = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
    for rank in range(num_processes):
        for name, runs, tensors in read_state(out / f"{prefix}_{rank}.safetensors"):
            runs.of(owned[name]).add_(1)
            for kind, tensor in tensors.items():
                runs.of(state[name, kind]).copy_(tensor.view(runs.count, runs.length))
    for name, counts in owned.items():
        assert bool((counts == 1).all()), f"{name}: fragments do not tile the parameter"
    return state


def largest_relative_error(first: Outcome, second: Outcome, kind: str) -> tuple[float, str]:
    """Largest ``|a - b| / |a|`` (norms per parameter) over the parameters, and where."""
    errors = []
    for (name, of_kind), tensor in first.state.items():
        if of_kind == kind:
            difference = torch.linalg.vector_norm(tensor - second.state[name, kind])
            errors.append((float(difference / torch.linalg.vector_norm(tensor).clamp_min(1e-30)), name))
    return max(errors)
