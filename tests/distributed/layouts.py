"""Run the layout worker and put its fragments together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3next_train.accounting.params import parameter_table
from qwen3next_train.config.schema import Config
from tests.integration.launching import REPOSITORY, environment


@dataclass(frozen=True)
class Outcome:
    """Metrics by step and the full training state by ``(parameter name, kind)``."""

    metrics: list[dict[str, float]]
    state: dict[tuple[str, str], torch.Tensor]


def train_at(config: Config, folder: Path, *, num_processes: int, packed: bool = True) -> Outcome:
    """Train ``config`` with ``num_processes`` ranks; every element of the state must be owned exactly once."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": config.model_dump(), "packed": packed}))
    worker = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = subprocess.run(
        [*worker, "-m", "tests.distributed.layout_worker", str(folder / "config.json"), str(folder)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = {spec.name: spec.numel for spec in parameter_table(config.model)}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    state = {(name, kind): torch.full((size,), torch.nan) for name, size in sizes.items() for kind in kinds}
    owned = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
    for rank in range(num_processes):
        for name, start, tensors in torch.load(folder / f"rank_{rank}.pt", weights_only=True):
            piece = slice(start, start + tensors["master"].numel())
            owned[name][piece] += 1
            for kind, tensor in tensors.items():
                state[name, kind][piece] = tensor
    for name, counts in owned.items():
        assert bool((counts == 1).all()), f"{name}: fragments do not tile the parameter"
    return Outcome(json.loads((folder / "metrics.json").read_text()), state)


def largest_relative_error(first: Outcome, second: Outcome, kind: str) -> tuple[float, str]:
    """Largest ``|a - b| / |a|`` (norms per parameter) over the parameters, and where."""
    errors = []
    for (name, of_kind), tensor in first.state.items():
        if of_kind == kind:
            difference = torch.linalg.vector_norm(tensor - second.state[name, kind])
            errors.append((float(difference / torch.linalg.vector_norm(tensor).clamp_min(1e-30)), name))
    return max(errors)
