"""Whole runs in bf16 whose rows, or heads, are over two and four GPUs, against one GPU with whole rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.gpu_curves import STEPS, losses_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BAND = 0.01
"""Relative difference of the loss at any step: as between one GPU with and without recompute, by rounding in bf16."""
SHARED = {
    # Enough for four ranks.
    "model__num_attention_heads": 4,
    "model__num_key_value_heads": 2,
    "model__linear_num_key_heads": 2,
    "model__linear_num_value_heads": 4,
    # A state that lasts as long as a row, so that it matters whether it is passed.
    "model__linear_dt_init": "log_uniform",
    "run__global_batch_size": 8,
    "run__micro_batch_size": 1,
}
FOUR = {"parallel__expert_parallel_size": 2, "parallel__recompute": "[layer]"}
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "one GPU": (1, {}),
    "2 slices": (2, {"parallel__context_parallel_size": 2}),
    "4 slices": (4, {"parallel__context_parallel_size": 4, **FOUR}),
    "2 shares of heads": (2, {"parallel__tensor_parallel_size": 2}),
    "2 slices, 2 shares of heads": (
        4,
        {"parallel__context_parallel_size": 2, "parallel__tensor_parallel_size": 2, **FOUR},
    ),
}


def test_the_curves_are_that_of_one_gpu(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs, for all layouts 4")
    losses = losses_of(tmp_path, RUNS, **SHARED)
    expected = losses["one GPU"]
    assert len(expected) == STEPS
    assert expected[-1] < 0.98 * expected[0]
    for name, found in losses.items():
        assert found == pytest.approx(expected, rel=BAND), name
