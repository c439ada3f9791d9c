"""Rows over several ranks, by slices, heads or both, give the losses and weights of one rank (fp32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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
"""What may be chosen beside the sizes, and has to make no difference."""


class Sizes(NamedTuple):
    """How many ranks share what."""

    ranks: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1


ONE = Sizes()
LAYOUTS = {
    Sizes(ranks=2, context=2, expert=2): ["loads of a row", "loads of a micro-batch", "dense exchange"],
    Sizes(ranks=4, context=4, expert=2): [setting for setting in SETTINGS if setting != "loads of a micro-batch"],
    Sizes(ranks=2, tensor=2, expert=2): ["loads of a row", "dense exchange", "recompute"],
    # More ranks than key and value heads.
    Sizes(ranks=4, tensor=4): ["loads of a step, two rows", "long memory"],
    Sizes(ranks=4, context=2, tensor=2, expert=4): ["loads of a row", "whole layers again, two rows"],
}
"""Every setting with slices, most with four, which have slices in between; what adds over all of a row with two as
well, and the exchange that does not wait for the host with experts over one group of slices and over half of one. With
divided heads those that tell the ways of sharing apart."""
CASES = [(sizes, setting) for sizes, settings in LAYOUTS.items() for setting in settings]


def _config(settings: dict[str, Any], sizes: Sizes) -> Config:
    """A step of two micro-batches, two MTP depths, clipped. What follows from its weights is in the layout matrix."""
    values = small_config(
        micro_batch_size=settings.get("micro_batch_size", 1),
        steps=1,
        clip_grad=0.5,
        scope=settings.get("scope", "sequence"),
    ).model_dump()
    values["run"]["global_batch_size"] = 2 * values["run"]["micro_batch_size"]
    values["model"] |= {
        "mtp_num_layers": 2,
        "linear_dt_init": settings.get("linear_dt_init", "ones"),
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
    }
    if sizes != ONE:
        values["parallel"] |= {name: settings[name] for name in ("token_exchange", "recompute") if name in settings}
        shared = {"context": sizes.context, "tensor": sizes.tensor, "expert": sizes.expert}
        values["parallel"] |= {f"{name}_parallel_size": size for name, size in shared.items()}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Sizes, str], Outcome]:
    """Every setting by one rank and at every layout."""
    folder = tmp_path_factory.mktemp("context")
    found = {}
    alone = [(ONE, setting) for setting in SETTINGS]
    for num_ranks in (1, 2, 4):
        runs = [(sizes, setting) for sizes, setting in (*alone, *CASES) if sizes.ranks == num_ranks]
        jobs = [Job(_config(SETTINGS[setting], sizes)) for sizes, setting in runs]
        trained = train_all(jobs, folder / str(num_ranks), num_processes=num_ranks)
        found.update(zip(runs, trained, strict=True))
    return found


@pytest.mark.parametrize(("sizes", "setting"), CASES, ids=str)
def test_rows_over_ranks_train_as_on_one(
    outcomes: dict[tuple[Sizes, str], Outcome], setting: str, sizes: Sizes
) -> None:
    far = difference(outcomes[ONE, setting], outcomes[sizes, setting])
    assert far.metric < METRIC_BOUND, far
    assert far.parameter < BOUND, far


def test_validation_loss_is_that_of_whole_rows(tmp_path: Path) -> None:
    """And so is the number of targets."""
    losses = {}
    for number, sizes in enumerate((ONE, *LAYOUTS)):
        config = _config({"micro_batch_size": 2}, sizes)
        out = tmp_path / str(number)
        out.mkdir()
        (out / "config.json").write_text(config.model_dump_json())
        perform("context_worker", out, num_processes=sizes.ranks)
        found = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(sizes.ranks)]
        assert found == [found[0]] * sizes.ranks
        losses[sizes] = found[0]
    for sizes in LAYOUTS:
        assert losses[sizes]["loss"] == pytest.approx(losses[ONE]["loss"], rel=1e-6)
        assert losses[sizes]["num_targets"] == losses[ONE]["num_targets"] > 0
