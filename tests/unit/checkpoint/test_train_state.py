from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qwen3next_train.checkpoint.train_state import restore_rng, rng_state
from qwen3next_train.errors import CheckpointError
from tests.unit.checkpoint.support import train_state


def _draw() -> tuple[float, float, float, float, float]:
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1)))


@pytest.mark.parametrize("num_draws_before", [0, 1])
def test_generators_continue_where_they_were(num_draws_before: int) -> None:
    # After an odd number of normal deviates, python and numpy hold back a second one: state like any other.
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for _ in range(num_draws_before):
        _draw()
    state = rng_state()
    expected = [_draw() for _ in range(3)]
    restore_rng(state)
    assert [_draw() for _ in range(3)] == expected


@pytest.mark.parametrize(
    "damage",
    [
        {"python": torch.zeros(3, dtype=torch.int64)},
        {"python": torch.full((625,), -1)},
        {"numpy": torch.zeros(3, dtype=torch.int64)},
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"torch": torch.zeros(5056)},
        {"python_gauss": torch.zeros(2)},
    ],
)
def test_a_state_no_generator_accepts_is_one_error(damage: dict[str, torch.Tensor]) -> None:
    intact = rng_state()
    with pytest.raises(CheckpointError, match="random generator state in the checkpoint is unusable"):
        restore_rng({**intact, **damage})
    restore_rng(intact)


def test_a_missing_generator_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="numpy"):
        restore_rng({name: tensor for name, tensor in rng_state().items() if name != "numpy"})


def test_the_train_state_is_typed_and_can_be_advanced() -> None:
    state = train_state(3)
    assert replace(state, step=4, flops_total=state.flops_total + 1).flops_total == 3 * 10**24 + 1
    for wrong in ({"step": -1}, {"step": 1.0}, {"step": 2**63}, {"wandb_id": None}, {"flops_total": 1e20}):
        with pytest.raises(ValidationError):
            replace(state, **wrong)


@pytest.mark.gpu
def test_the_gpu_generator_continues_where_it_was() -> None:
    torch.rand(1, device="cuda")
    state = rng_state()
    expected = torch.rand(3, device="cuda")
    restore_rng(state)
    assert torch.rand(3, device="cuda").equal(expected)
