"""Rows over several ranks give one rank's losses, gradient norm and weights, whatever else is chosen (fp32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.layout_matrix import BOUND, METRIC_BOUND, difference
from tests.distributed.layouts import Job, Outcome, train_all
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = pytest.mark.dist

SETTINGS: dict[str, dict[str, Any]] = {
    "loads of a row": {"scope": "sequence"},
    "loads of a micro-batch": {"scope": "micro_batch"},
    "loads of a step, two rows": {"scope": "global", "micro_batch_size": 2},
    "dense exchange": {"token_exchange": "dense"},
    "recompute": {"recompute": ["norms", "activations", "gdn_prologue"]},
    "whole layers again, two rows": {"recompute": ["layer"], "micro_batch_size": 2},
    "long memory": {"linear_dt_init": "log_uniform"},
}
"""What may be chosen beside a context-parallel size, and has to make no difference."""
LAYOUTS = {2: (2, 2), 4: (4, 2)}
"""Context- and expert-parallel size, by number of ranks."""


def _config(settings: dict[str, Any], *, context_parallel_size: int = 1, expert_parallel_size: int = 1) -> Config:
    """Three steps of four rows, two MTP depths, clipped."""
    values = small_config(
        micro_batch_size=settings.get("micro_batch_size", 1),
        steps=3,
        clip_grad=0.5,
        scope=settings.get("scope", "sequence"),
    ).model_dump()
    values["model"] |= {"mtp_num_layers": 2, "linear_dt_init": settings.get("linear_dt_init", "ones")}
    if context_parallel_size > 1:
        given = {name: settings[name] for name in ("token_exchange", "recompute") if name in settings}
        sizes = {"context_parallel_size": context_parallel_size, "expert_parallel_size": expert_parallel_size}
        values["parallel"] |= {**sizes, **given}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Outcome]:
    """Every setting by one rank, by two and by four."""
    folder = tmp_path_factory.mktemp("context")
    found = {}
    for num_ranks in (1, 2, 4):
        context, expert = LAYOUTS.get(num_ranks, (1, 1))
        jobs = [
            Job(_config(settings, context_parallel_size=context, expert_parallel_size=expert))
            for settings in SETTINGS.values()
        ]
        trained = train_all(jobs, folder / str(num_ranks), num_processes=num_ranks)
        found.update(zip(((name, num_ranks) for name in SETTINGS), trained, strict=True))
    return found


@pytest.mark.parametrize("num_ranks", LAYOUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_over_ranks_train_as_on_one(
    outcomes: dict[tuple[str, int], Outcome], setting: str, num_ranks: int
) -> None:
    far = difference(outcomes[setting, 1], outcomes[setting, num_ranks])
    assert far.metric < METRIC_BOUND, far
    assert far.parameter < BOUND, far


def test_validation_loss_is_that_of_whole_rows(tmp_path: Path) -> None:
    """And so is the number of targets."""
    losses = {}
    for num_ranks in (1, 2, 4):
        context, expert = LAYOUTS.get(num_ranks, (1, 1))
        config = _config({"micro_batch_size": 2}, context_parallel_size=context, expert_parallel_size=expert)
        out = tmp_path / str(num_ranks)
        out.mkdir()
        (out / "config.json").write_text(config.model_dump_json())
        perform("context_worker", out, num_processes=num_ranks)
        found = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(num_ranks)]
        assert found == [found[0]] * num_ranks
        losses[num_ranks] = found[0]
    for num_ranks in LAYOUTS:
        assert losses[num_ranks]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
        assert losses[num_ranks]["num_targets"] == losses[1]["num_targets"] > 0
