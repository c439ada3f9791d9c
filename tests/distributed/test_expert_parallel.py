"""Tokens travel to their experts and back without loss, however uneven the routing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import perform


def _errors(out: Path, world_size: int, device: str) -> dict[str, float]:
    perform("dispatch_worker", out, device, num_processes=world_size)
    errors: dict[str, float] = json.loads(out.read_text())
    assert len(errors) == 5
    return errors


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_on_other_ranks_compute_the_same(tmp_path: Path, world_size: int) -> None:
    for routing, error in _errors(tmp_path / "errors.json", world_size, "cpu").items():
        assert error < 1e-12, routing


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_compute_the_same(tmp_path: Path) -> None:
    for routing, error in _errors(tmp_path / "errors.json", 2, "cuda").items():
        assert error < 1e-4, routing
