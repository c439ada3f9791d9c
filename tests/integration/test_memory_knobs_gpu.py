"""Whole runs on a GPU with an offloaded optimizer, bf16 moments and recompute."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.gpu_curves import STEPS, losses_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "plain": (1, {}),
    "offload": (1, {"parallel__offload_optimizer": "cpu"}),
    "offload bf16": (
        1,
        {"parallel__offload_optimizer": "cpu", "parallel__zero_stage": 2, "optimizer__moments_dtype": "bf16"},
    ),
    "bf16 recompute": (
        1,
        {"optimizer__moments_dtype": "bf16", "parallel__recompute": "[norms, activations, gdn_prologue]"},
    ),
    "zero-3 layer": (1, {"parallel__zero_stage": 3, "parallel__recompute": "[layer]"}),
}


def test_the_curves_are_that_of_the_plain_run(tmp_path: Path) -> None:
    losses = losses_of(tmp_path, RUNS)
    expected = losses["plain"]
    assert len(expected) == STEPS
    assert expected[-1] < 0.98 * expected[0]
    for name, found in losses.items():
        assert found == pytest.approx(expected, rel=0.01), name
