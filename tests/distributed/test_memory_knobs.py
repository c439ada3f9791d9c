"""What saves memory changes nothing else with experts over two ranks either (fp32, CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import Config
from tests.distributed.layouts import Outcome, largest_relative_error, train_at
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _config(zero_stage: int, **parallel: Any) -> Config:
    """Two steps of two micro-batches on each of two ranks."""
    values = small_config(micro_batch_size=1, steps=2, clip_grad=0.5, scope="global").model_dump()
    values["parallel"] |= {"expert_parallel_size": 2, "zero_stage": zero_stage, **parallel}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    folder = tmp_path_factory.mktemp("memory")
    return {stage: train_at(_config(stage), folder / str(stage), num_processes=2) for stage in (2, 3)}


@pytest.mark.parametrize("recompute", [["norms", "activations", "conv_gates"], ["layer"]], ids="+".join)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_recompute_is_bit_equal(
    tmp_path: Path, without: dict[int, Outcome], zero_stage: int, recompute: list[str]
) -> None:
    """Whole layers exchange their tokens again, in the same order on both ranks."""
    found = train_at(_config(zero_stage, recompute=recompute), tmp_path / "run", num_processes=2)
    assert found.metrics == without[zero_stage].metrics
    for key, tensor in without[zero_stage].state.items():
        assert torch.equal(found.state[key], tensor), key


def test_an_offloaded_optimizer_takes_the_same_steps(tmp_path: Path, without: dict[int, Outcome]) -> None:
    """Up to rounding: expert norms are counted once there as well."""
    found = train_at(_config(2, offload_optimizer="cpu"), tmp_path / "run", num_processes=2)
    for expected, metrics in zip(without[2].metrics, found.metrics, strict=True):
        for metric, value in expected.items():
            assert metrics[metric] == pytest.approx(value, rel=1e-6), metric
    for kind in ("master", "exp_avg"):
        error, name = largest_relative_error(without[2], found, kind)
        assert error < 1e-5, name
