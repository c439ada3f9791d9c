"""Training by the dense exchange has the bits of training by the exact one; for want of room a step is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.exchange_worker import LITTLE_ROOM
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

_PARTS = ("norms", "activations", "gdn_prologue")
# Processes, expert-parallel size, ZeRO stage, recompute: each stage, size and part in at least one.
CASES: list[tuple[int, int, int, tuple[str, ...]]] = [
    (2, 2, 1, ("layer",)),
    (2, 2, 3, _PARTS),
    (4, 4, 1, _PARTS),
    (4, 2, 2, ()),
]


def _config(expert_parallel_size: int, zero_stage: int, recompute: tuple[str, ...], num_processes: int) -> Config:
    """Two micro-batches a rank, of packed rows, with MTP."""
    values = small_config(clip_grad=0.5).model_dump()
    values["run"]["global_batch_size"] = 2 * num_processes
    values["model"]["mtp_num_layers"] = 1
    values["parallel"] |= {
        "expert_parallel_size": expert_parallel_size,
        "zero_stage": zero_stage,
        "recompute": list(recompute),
    }
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """What each rank saw, by case."""
    folder = tmp_path_factory.mktemp("exchange")
    outs = {}
    for num_processes in (2, 4):
        jobs = []
        for index, case in enumerate(case for case in CASES if case[0] == num_processes):
            outs[case] = folder / f"{num_processes}-{index}"
            outs[case].mkdir()
            jobs.append({"config": _config(*case[1:], num_processes).model_dump(), "out": str(outs[case])})
        path = folder / f"jobs-{num_processes}.json"
        path.write_text(json.dumps(jobs))
        perform("exchange_worker", path, num_processes=num_processes, timeout=600)
    return {
        case: [json.loads((Path(out) / f"rank_{rank}.json").read_text()) for rank in range(case[0])]
        for case, out in outs.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_dense_has_the_bits_of_exact(
    seen: dict[tuple[Any, ...], list[dict[str, Any]]], case: tuple[int, int, int, tuple[str, ...]]
) -> None:
    for rank in seen[case]:
        assert rank["dispatchers"] == [["AllToAllDispatcher"] * 2, ["DenseDispatcher", "AllToAllDispatcher"]]
        assert rank["dense as exact"]
        assert rank["evaluation"]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] < 3], ids=lambda case: "-".join(map(str, case)))
def test_two_micro_batches_in_flight_make_the_same_steps(
    seen: dict[tuple[Any, ...], list[dict[str, Any]]], case: tuple[int, int, int, tuple[str, ...]]
) -> None:
    for rank in seen[case]:
        assert rank["overlapped dense as overlapped exact"]
        assert rank["overlapped from exact"] < 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_without_enough_room_is_repeated_and_a_diverged_one_is_not(
    seen: dict[tuple[Any, ...], list[dict[str, Any]]], case: tuple[int, int, int, tuple[str, ...]]
) -> None:
    expert_parallel_size = case[1]
    tokens, top_k = 48, 3
    most = expert_parallel_size * tokens * min(top_k, 8 // expert_parallel_size)
    for rank in seen[case]:
        assert rank["repeated with more room"]
        # A quarter and 1,024 rows more than were needed is more than there can be.
        assert rank["room"] == most
        assert rank["diverged"][:2] == [True, LITTLE_ROOM]
    assert max(rank["diverged"][2] for rank in seen[case]) > LITTLE_ROOM
