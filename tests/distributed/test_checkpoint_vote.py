"""Two real processes: whatever befalls one rank, both do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import checkpoint_worker
from tests.forked import start
from tests.unit.checkpoint.support import assert_holds, manager, names, save

pytestmark = pytest.mark.dist


def _play(scenario: str, folder: Path) -> tuple[list[int | None], list[dict[str, Any] | None]]:
    """Exit codes and results of the two ranks."""
    ranks = [start(checkpoint_worker.main, scenario, rank, folder) for rank in range(2)]
    try:
        for rank in ranks:
            rank.join(timeout=120)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    paths = [folder / f"rank_{rank}.json" for rank in range(2)]
    return codes, [json.loads(path.read_text()) if path.exists() else None for path in paths]


def test_both_ranks_raise_and_skip_together(tmp_path: Path) -> None:
    codes, results = _play("fails", tmp_path)
    assert codes == [0, 0]
    assert results[0] == results[1]
    assert results[0] is not None
    reason = "rank 1: rank_00001.safetensors: No space left on device; needed "
    assert f"checkpoint of step 3 not saved: {reason}" in results[0]["error"]
    assert results[0]["names"] == ["latest", "step_00000001", "step_00000002"]
    assert results[0]["found"] == 2
    assert "step_00000002: rank 1 cannot read it (MANIFEST.json: Input/output error)" in results[0]["error_when_broken"]
    assert results[0]["found_when_damaged"] == 1
    assert_holds(manager(tmp_path / "checkpoints").find_latest(), 1)


def test_a_rank_killed_while_writing_costs_only_that_save(tmp_path: Path) -> None:
    codes, results = _play("killed", tmp_path)
    assert codes == [0, -9]
    assert results[0] is not None
    assert results[0]["error"]
    directory = tmp_path / "checkpoints"
    assert len(names(directory)) == 2
    assert_holds(manager(directory).find_latest(), 1)
    save(manager(directory), 3)
    assert names(directory) == {"step_00000001", "step_00000003"}
