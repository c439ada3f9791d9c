"""The tiny model at every layout of a world of 1, 2 or 4 ranks: which runs there are, and how far apart two are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import Config
from tests.distributed.layout_worker import NUM_SOURCES
from tests.distributed.layouts import Job, Outcome
from tests.integration.launching import REPOSITORY

GOLDEN_LOSSES = Path(__file__).with_name("golden_losses.json")
GOLDEN_METRICS = ("loss/lm", "loss/mtp", "loss/load_balancing", "loss/z", "loss/total", "optim/grad_norm")
SOURCES = tuple(f"source_{number}" for number in range(NUM_SOURCES))
STEPS = 8
"""Of the tests; the table of docs/layouts.md and the golden losses have :data:`TABLE_STEPS`.

Weights of norms begin at 0: an element whose first gradient is little more than rounding, which Adam makes a step of
full size, counts the more the fewer steps follow. After 5 it is what :data:`BOUND` allows, after 8 three quarters.
"""
TABLE_STEPS = 20
GLOBAL_BATCH_SIZE = 12
FIRST_SAMPLE = {True: 0, False: 230_000}
"""Where the packed and the dense rows begin: where no routing decision is narrower than :data:`NARROWEST`.

The best experts of a token jump where two of them are level. Ten thousand decisions come as close as 1e-6 somewhere,
which is what layouts differ by, and a single one taken the other way shows as 1e-3 in an expert's weights.
"""
NARROWEST = 5e-6
"""Smallest difference of logits between a chosen expert and the best one that was not, over all steps of one rank."""
METRIC_BOUND = 1e-6
"""Largest relative difference of a metric at any step."""
BOUND = 1e-5
"""Largest relative difference of a parameter (norms) after the last step."""


@dataclass(frozen=True)
class Layout:
    """How the same global batch is spread, and whether its rows are packed from several documents."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    accumulation: int
    packed: bool
    steps: int = STEPS
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that have rows of their own."""
        return self.world_size // (self.context_parallel_size * self.tensor_parallel_size)

    @property
    def job(self) -> Job:
        """The tiny configuration at half its width and an eighth of its vocabulary, with short rows and a z-loss.

        And with a third of its learning rate: at the full one twenty steps multiply differences in rounding by up to
        ten.
        """
        overrides = {
            "run.steps": self.steps,
            "run.global_batch_size": GLOBAL_BATCH_SIZE,
            "run.micro_batch_size": GLOBAL_BATCH_SIZE // self.data_parallel_size // self.accumulation,
            "data.sequence_length": 24,
            "model.vocab_size": 512,
            "model.hidden_size": 64,
            "model.router_z_loss_coef": 1e-3,
            "optimizer.lr": 1e-3,
            "schedule.kind": "constant",
            "parallel.expert_parallel_size": self.expert_parallel_size,
            "parallel.context_parallel_size": self.context_parallel_size,
            "parallel.tensor_parallel_size": self.tensor_parallel_size,
            "parallel.zero_stage": self.zero_stage,
            "data.sources": str([{"source": "made", "alias": name} for name in SOURCES]),
            "logging.loss_by": "[source, position]",
        }
        return Job(_tiny(overrides), self.packed, first_sample=FIRST_SAMPLE[self.packed])


def _tiny(overrides: dict[str, Any]) -> Config:
    path = REPOSITORY / "configs" / "qwen3next_tiny.yaml"
    return load_config([path], [(key, str(value)) for key, value in overrides.items()]).config


def references(steps: int = STEPS) -> list[Layout]:
    """One rank, four micro-batches: what the others are compared with."""
    return [Layout(1, 1, 1, 4, packed, steps) for packed in (True, False)]


def all_layouts(world_size: int, steps: int = STEPS) -> list[Layout]:
    """Every way to share rows, expert-parallel size, ZeRO stage, accumulation and kind of row.

    Tensor-parallel sizes are 1 and 2: the tiny model has two key and value heads.
    """
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    shared = [sizes_of_row for sizes_of_row in product(sizes, (1, 2)) if world_size % math.prod(sizes_of_row) == 0]
    return [
        Layout(world_size, expert_parallel_size, zero_stage, accumulation, packed, steps, *sizes_of_row)
        for sizes_of_row in shared
        for expert_parallel_size in sizes
        for zero_stage in (1, 2, 3)
        for accumulation in (1, 3)
        for packed in (True, False)
    ]


_CHOSEN = (
    # Data-, context-, tensor- and expert-parallel size, ZeRO stage, accumulation, whether rows are packed.
    (2, 1, 1, 1, 1, 1, True),
    (2, 1, 1, 2, 1, 3, False),
    (1, 1, 2, 1, 2, 3, True),
    (1, 2, 1, 1, 3, 3, True),
    (4, 1, 1, 1, 1, 1, False),
    (4, 1, 1, 2, 2, 3, False),
    (4, 1, 1, 4, 3, 1, True),
    (2, 2, 1, 4, 2, 1, False),
    (1, 4, 1, 1, 2, 1, True),
    (1, 4, 1, 2, 3, 1, True),
    (1, 4, 1, 4, 1, 3, False),
    (2, 1, 2, 4, 3, 1, False),
    (1, 2, 2, 2, 1, 1, True),
)


def covering_layouts(world_size: int, steps: int = STEPS) -> list[Layout]:
    """Those of :func:`all_layouts` of 2 and 4 ranks whose steps cost least among which every pair of settings occurs.

    A setting counts wherever it stands: experts over 2 ranks with ZeRO-3 among 2 ranks or among 4. What the number of
    ranks decides is in the data-parallel size.

    Returns:
        The part of one number of ranks.
    """
    layouts = [
        Layout(data * context * tensor, expert, zero_stage, accumulation, packed, steps, context, tensor)
        for data, context, tensor, expert, zero_stage, accumulation, packed in _CHOSEN
    ]
    return [layout for layout in layouts if layout.world_size == world_size]


def covering(layouts: Sequence[Layout]) -> list[Layout]:
    """As few of some layouts as make every pair of two settings that occurs among them."""
    chosen: list[Layout] = []
    missing = set().union(*map(_pairs, layouts))
    while missing:
        best = max(layouts, key=lambda layout: len(_pairs(layout) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(layout: Layout) -> set[tuple[tuple[str, Any], ...]]:
    return set(combinations(sorted(vars(layout).items()), 2))


@dataclass(frozen=True)
class Difference:
    """Largest relative differences, and where."""

    metric: float
    metric_name: str
    parameter: float
    parameter_name: str


def difference(expected: Outcome, found: Outcome) -> Difference:
    """Metrics of all steps, parameters after the last one."""
    return Difference(*max(_metric_errors(expected.metrics, found.metrics)), *max(_parameter_errors(expected, found)))


def _metric_errors(
    expected: Iterable[dict[str, float]], found: Iterable[dict[str, float]]
) -> Iterator[tuple[float, str]]:
    for left, right in zip(expected, found, strict=True):
        for name in {*GOLDEN_METRICS, *split_losses(left)}:
            yield abs(right[name] - left[name]) / abs(left[name]), name


def split_losses(metrics: dict[str, float]) -> list[str]:
    """Names of a step's losses, those by source and position included, and of the sources' shares."""
    return [name for name in metrics if name.startswith(("data/", "loss/"))]


def _parameter_errors(expected: Outcome, found: Outcome) -> Iterator[tuple[float, str]]:
    for (name, kind), tensor in expected.state.items():
        if kind == "master":
            error = torch.linalg.vector_norm(tensor - found.state[name, kind]) / torch.linalg.vector_norm(tensor)
            yield float(error), name


def golden_losses() -> dict[str, list[dict[str, float]]]:
    """Recorded metrics of the one-rank runs by kind of row (``packed``, ``dense``)."""
    golden: dict[str, list[dict[str, float]]] = json.loads(GOLDEN_LOSSES.read_text())
    return golden


def kind_of_row(layout: Layout) -> str:
    """Key of the golden table."""
    return "packed" if layout.packed else "dense"
