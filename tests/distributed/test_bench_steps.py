"""The benchmark of whole steps measures what ranks do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import perform

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("zero_stage", "context_parallel_size"), [(3, 1), (1, 2)])
def test_a_row_has_times_rates_and_parts(tmp_path: Path, zero_stage: int, context_parallel_size: int) -> None:
    perform("bench_worker", zero_stage, context_parallel_size, tmp_path / "report.json", num_processes=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["ms"]) == 2
    assert min(report["ms"]) > 0
    assert report["tflops"] > 0
    assert report["plan_bytes"] > 0
    # Ranges of the profiler, in which gradients are summed in buckets under stage 1, in partitions under stage 3.
    assert report["parts"]["accumulation"] > 0
    assert report["parts"]["AdamW"] > 0
