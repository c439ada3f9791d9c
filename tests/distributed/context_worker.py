"""Validation loss of a new model, as a task of :mod:`tests.distributed.ranks`.

Its argument names a folder with ``config.json``; each rank writes ``rank_<r>.json`` with the loss of the rows of two
steps and the number of targets.
"""

from __future__ import annotations

import json
from pathlib import Path

from qwen3next_train.config.schema import Config
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.layout_worker import rank_batches


def perform(context: ProcessContext, folder: str) -> None:
    """Evaluate and write."""
    config = Config.model_validate_json((Path(folder) / "config.json").read_text())
    topology = context.topology(config.parallel)
    engine = build_engine(config, context)
    batches = [batch for step in range(2) for batch in rank_batches(config, topology, step, packed=True)]
    loss, num_targets = engine.eval_loss(batches)
    found = {"loss": loss, "num_targets": num_targets}
    (Path(folder) / f"rank_{context.rank}.json").write_text(json.dumps(found))
