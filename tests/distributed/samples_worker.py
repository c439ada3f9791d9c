"""Train with and without samples, as a task of :mod:`tests.distributed.ranks`.

Its argument names a folder with ``jobs.json``: a list of ``{config, out}``. Each rank writes ``rank_<r>.json`` into
every folder ``out``: the metrics of each step ``plain`` and ``sampled``, and the token ids of the samples behind each
step, greedy ones first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import Report, StepTotals
from qwen3next_train.generate.sampling import Sampling
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches

PROMPTS = [[3], [5, 6, 7, 8, 9], list(range(12))]


def train(config: Config, context: ProcessContext, *, samples: bool) -> dict[str, Any]:
    """A new model, for ``run.steps`` steps."""
    topology = context.topology(config.parallel)
    engine = build_engine(config, context)
    metrics: list[dict[str, float]] = []
    texts = []

    def sample() -> None:
        for sampling in (Sampling(3), Sampling(3, temperature=1.0, top_p=0.9, seed=len(metrics))) if samples else ():
            found = engine.continue_prompts(PROMPTS, sampling, end_token_id=11, max_batch_tokens=36)
            texts.append([each.ids for each in found])

    for step in range(config.run.steps):
        batches = rank_batches(config, topology, step, packed=True)
        totals = StepTotals.over_ranks(batches, context.control.sum_ints)
        metrics.append(engine.train_step(batches, totals=totals, lr=3e-3, report=Report.SUMMARY).metrics)
        sample()
    return {"metrics": metrics, "texts": texts}


def perform(context: ProcessContext, folder: str) -> None:
    """Do one job after the other."""
    for job in json.loads((Path(folder) / "jobs.json").read_text()):
        config = Config.model_validate(job["config"])
        found = {name: train(config, context, samples=name == "sampled") for name in ("plain", "sampled")}
        (Path(job["out"]) / f"rank_{context.rank}.json").write_text(json.dumps(found))
