"""Steps with a non-finite gradient, as a task of :mod:`tests.distributed.ranks`.

Its argument names a file: a list of ``{config, out}``. A step is taken as usual; then one element of one gradient of
one rank is NaN, in the next step's first micro-batch only; then one of the other rank is infinite; then a step is taken
as usual, and once more from the state before it. Each rank writes ``<out>/rank_<r>.json`` of what it saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import FragmentKind, Report, StepResult, StepTotals
from qwen3next_train.engine.zero_engine import ZeroEngine
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches

INJECTED = (
    ("model.layers.0.mlp.experts.gate_up_proj", float("nan"), 1),
    ("model.layers.0.linear_attn.A_log", float("inf"), 0),
)
"""Parameter, value and rank: an expert's weights in the run's precision, and a parameter that is fp32 in all runs."""

State = dict[tuple[str, FragmentKind], tuple[int, torch.Tensor]]


def perform(context: ProcessContext, jobs_path: str) -> None:
    """Do one job after the other."""
    for job in json.loads(Path(jobs_path).read_text()):
        seen = _observe(Config.model_validate(job["config"]), context)
        (Path(job["out"]) / f"rank_{context.rank}.json").write_text(json.dumps(seen))


def _observe(config: Config, context: ProcessContext) -> dict[str, Any]:
    topology = context.topology(config.parallel)
    engine = build_engine(config, context)

    def step(number: int) -> StepResult:
        batches = rank_batches(config, topology, number, packed=True)
        totals = StepTotals.over_ranks(batches, context.control.sum_ints)
        return engine.train_step(batches, totals=totals, lr=config.optimizer.lr, report=Report.SUMMARY)

    seen: dict[str, Any] = {"skipped": [step(0).skipped], "changed": [], "norms": []}
    before = _state(engine)
    weights = _weights(engine)
    for number, (name, value, rank) in enumerate(INJECTED, start=1):
        if context.rank == rank:
            _inject(engine, name, value)
        result = step(number)
        seen["skipped"].append(result.skipped)
        seen["norms"].append(str(result.metrics["optim/grad_norm"]))
        changed = _changed(before, _state(engine))
        changed += [name for name, weight in _weights(engine).items() if not torch.equal(weight, weights[name])]
        seen["changed"].append(changed)
    result = step(3)
    seen["skipped"].append(result.skipped)
    seen["updates"] = sorted(
        {int(state["step"]) for state in engine._engine.optimizer.optimizer.state.values() if "step" in state}
    )
    after = _state(engine)

    def read(name: str, kind: FragmentKind, start: int, stop: int) -> torch.Tensor:
        first, tensor = before[name, kind]
        return tensor[start - first : stop - first]

    engine.load_state(read, 1)
    seen["same_without_skips"] = step(3).metrics == result.metrics and not _changed(after, _state(engine))
    return seen


def _inject(engine: ZeroEngine, name: str, value: float) -> None:
    """Put ``value`` into the next gradient of the parameter, once."""

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    handle = dict(engine._model.named_parameters())[name].register_hook(spoil)


def _state(engine: ZeroEngine) -> State:
    return {
        (f.name, kind): (f.runs.start, tensor.clone()) for f in engine.fragments() for kind, tensor in f.tensors.items()
    }


def _weights(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """What the model computes with, as far as this rank holds it."""
    return {
        name: getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine._model.named_parameters()
    }


def _changed(before: State, after: State) -> list[str]:
    return [" ".join(key) for key, (_, tensor) in before.items() if not torch.equal(tensor, after[key][1])]
