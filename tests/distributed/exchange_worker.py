"""Train by the exact and by the dense exchange of tokens and compare the bits.

A task of :mod:`tests.distributed.ranks`. Its argument names a file: a list of ``{config, out}``. Each rank writes
``<out>/rank_<r>.json`` of what it saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import Config, TokenExchange
from qwen3next_train.engine.base import Report, StepResult, StepTotals
from qwen3next_train.model.dispatch import TokenDispatcher
from qwen3next_train.parallel.expert_parallel import AllToAllDispatcher, DenseDispatcher
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import make_row, rank_batches

LITTLE_ROOM = 5
"""Rows; less than any layer needs."""


def perform(context: ProcessContext, jobs_path: str) -> None:
    """Do one job after the other."""
    for job in json.loads(Path(jobs_path).read_text()):
        seen = _observe(Config.model_validate(job["config"]), context)
        (Path(job["out"]) / f"rank_{context.rank}.json").write_text(json.dumps(seen))


def _observe(config: Config, context: ProcessContext) -> dict[str, Any]:
    exact = _Training(config, "exact", context)
    dense, narrow = (_Training(config, "dense", context) for _ in range(2))
    assert narrow.engine._room is not None
    narrow.engine._room.rows = LITTLE_ROOM
    for training in (exact, dense, narrow):
        training.steps()
    seen = {
        "dispatchers": [[kind.__name__ for kind in training.dispatchers] for training in (exact, dense)],
        "dense as exact": dense.is_equal(exact),
        "repeated with more room": narrow.is_equal(exact),
        "room": narrow.engine._room.rows,
        "evaluation": dense.evaluate() == exact.evaluate(),
    }
    if config.parallel.zero_stage < 3:
        overlapped, exact_overlapped = (
            _Training(config, exchange, context, micro_batches_in_flight=2) for exchange in ("dense", "exact")
        )
        overlapped.steps()
        exact_overlapped.steps()
        seen["overlapped dense as overlapped exact"] = overlapped.is_equal(exact_overlapped)
        seen["overlapped from exact"] = overlapped.distance(exact)
    narrow.engine._room.rows = LITTLE_ROOM
    narrow.spoil()
    seen["diverged"] = [narrow.step(2).skipped, narrow.engine._room.rows, int(narrow.engine._room.largest)]
    return seen


class _Training:
    """Two steps by one kind of exchange."""

    def __init__(
        self, config: Config, exchange: TokenExchange, context: ProcessContext, *, micro_batches_in_flight: int = 1
    ) -> None:
        update = {"token_exchange": exchange, "micro_batches_in_flight": micro_batches_in_flight}
        parallel = config.parallel.model_copy(update=update)
        self.config = config.model_copy(update={"parallel": parallel})
        self.context = context
        self.topology = context.topology(parallel)
        self.engine = build_engine(self.config, context)
        self.results: list[StepResult] = []

    def steps(self) -> None:
        self.results = [self.step(number) for number in range(2)]

    def step(self, number: int) -> StepResult:
        batches = rank_batches(self.config, self.topology, number, packed=True)
        totals = StepTotals.over_ranks(batches, self.context.control.sum_ints)
        return self.engine.train_step(batches, totals=totals, lr=1e-3, report=Report.SUMMARY)

    def evaluate(self) -> tuple[float, int]:
        """On rows that are longer on some ranks than on others."""
        length, vocab_size = 24 * (1 + self.context.rank % 2), self.config.model.vocab_size
        row = make_row(self.context.rank, length=length, vocab_size=vocab_size, packed=True)
        return self.engine.eval_loss([PackedBatch.from_rows([row], mtp_depths=1)])

    @property
    def dispatchers(self) -> list[type[TokenDispatcher]]:
        """Kinds in training and in evaluation."""
        block = self.engine._model.model.layers[0].mlp
        found = []
        for training in (True, False):
            self.engine._model.train(training)
            found.append(type(block.dispatcher))
        assert set(found) <= {AllToAllDispatcher, DenseDispatcher}
        return found

    def is_equal(self, other: _Training) -> bool:
        """Metrics, weights and moments, to the bit."""
        pairs = zip(self.engine.fragments(), other.engine.fragments(), strict=True)
        same = all(torch.equal(mine.tensors[kind], its.tensors[kind]) for mine, its in pairs for kind in mine.tensors)
        return same and self.results == other.results

    def distance(self, other: _Training) -> float:
        """Largest relative difference of a metric or, by norm, of a parameter's master weights."""
        found = [0.0]
        for mine, its in zip(self.results, other.results, strict=True):
            found += [abs(mine.metrics[name] - value) / max(abs(value), 1e-7) for name, value in its.metrics.items()]
        for fragment, its_fragment in zip(self.engine.fragments(), other.engine.fragments(), strict=True):
            expected = its_fragment.tensors["master"]
            difference = (fragment.tensors["master"] - expected).norm()
            found.append(float(difference) / max(float(expected.norm()), 1e-7))
        return max(found)

    def spoil(self) -> None:
        """Make all that the model computes NaN."""
        with torch.no_grad():
            for parameter in self.engine._model.parameters():
                (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).fill_(torch.nan)
