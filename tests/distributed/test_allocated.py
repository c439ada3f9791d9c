"""Model states against what DeepSpeed really allocates, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import perform


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, ("fp32", "1", "fp32", "none", "1", "1")),
        (2, ("bf16", "1", "bf16", "none", "2", "1")),
        (2, ("bf16", "2", "fp32", "none", "1", "1")),
        (2, ("bf16", "1", "fp32", "cpu", "1", "1")),
        (2, ("bf16", "2", "bf16", "cpu", "1", "1")),
        (2, ("bf16", "3", "fp32", "none", "2", "1")),
        (2, ("fp32", "3", "fp32", "none", "1", "1")),
        (2, ("bf16", "1", "fp32", "none", "2", "2")),
        (2, ("bf16", "2", "fp32", "none", "1", "2")),
        (2, ("bf16", "3", "fp32", "none", "1", "2")),
        (4, ("bf16", "1", "fp32", "none", "1", "4")),
    ],
    ids=lambda settings: "-".join(settings) if isinstance(settings, tuple) else str(settings),
)
def test_states_are_what_deepspeed_allocates(tmp_path: Path, processes: int, settings: tuple[str, ...]) -> None:
    """Weights, accumulated gradients in the middle of a step, master and moments after it."""
    perform("allocated_worker", *settings, tmp_path / "report.json", num_processes=processes)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["allocated"] == report["counted"]
