"""The tiny model follows one rank's curve at every way to share experts and rows and ZeRO stage (docs/layouts.md)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layout_matrix import (
    BOUND,
    GOLDEN_METRICS,
    METRIC_BOUND,
    NARROWEST,
    SOURCES,
    STEPS,
    Layout,
    all_layouts,
    covering_layouts,
    difference,
    golden_losses,
    kind_of_row,
    references,
    split_losses,
)
from tests.distributed.layouts import Outcome, train_all


def test_the_runs_below_have_every_pair_of_settings() -> None:
    """Of all layouts of 2 and 4 ranks; scripts/goldens/layout_table.py runs the others."""

    def pairs(layouts: Iterable[Layout]) -> set[tuple[tuple[str, Any], ...]]:
        settings = [vars(layout) | {"data_parallel_size": layout.data_parallel_size} for layout in layouts]
        return {
            pair
            for each in settings
            for pair in combinations(((name, value) for name, value in each.items() if name != "world_size"), 2)
        }

    chosen, everything = ([layout for size in (2, 4) for layout in of(size)] for of in (covering_layouts, all_layouts))
    assert set(chosen) < set(everything)
    assert len(chosen) < len(everything) / 15
    assert pairs(chosen) == pairs(everything)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    layouts = references()
    outcomes = train_all([r.job for r in layouts], tmp_path_factory.mktemp("one") / "runs", num_processes=1)
    return {kind_of_row(layout): outcome for layout, outcome in zip(layouts, outcomes, strict=True)}


@pytest.mark.dist
@pytest.mark.slow
def test_no_routing_decision_hangs_on_rounding(one_rank: dict[str, Outcome]) -> None:
    for kind, outcome in one_rank.items():
        assert min(outcome.margins) > NARROWEST, kind


@pytest.mark.dist
@pytest.mark.slow
def test_one_rank_has_the_golden_losses(one_rank: dict[str, Outcome]) -> None:
    golden = golden_losses()
    assert golden.keys() == one_rank.keys()
    for kind, outcome in one_rank.items():
        for expected, found in zip(golden[kind][:STEPS], outcome.metrics, strict=True):
            # By source the loss and the share, and two ranges of positions.
            assert len(split_losses(found)) == len(GOLDEN_METRICS) - 1 + 2 * len(SOURCES) + 2
            for name in GOLDEN_METRICS:
                assert found[name] == pytest.approx(expected[name], rel=METRIC_BOUND), (kind, name)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_has_one_ranks_curve_and_parameters(
    tmp_path: Path, one_rank: dict[str, Outcome], world_size: int
) -> None:
    layouts = covering_layouts(world_size)
    outcomes = train_all([r.job for r in layouts], tmp_path / "runs", num_processes=world_size)
    for layout, outcome in zip(layouts, outcomes, strict=True):
        far = difference(one_rank[kind_of_row(layout)], outcome)
        assert far.metric < METRIC_BOUND, (layout, far)
        assert far.parameter < BOUND, (layout, far)
