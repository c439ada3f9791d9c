"""Training by the dense exchange has the bits of training by the exact one; for want of room a step is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.exchange_worker import LITTLE_ROOM
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

_PARTS = ("norms", "activations", "gdn_prologue")
_TOP_K = 3


class Case(NamedTuple):
    """Each stage and part is in at least one; all ranks of a group and two groups; a rank with fewer experts than a
    token has choices, and with more. More than two ranks of a group exchange tokens in ``test_expert_parallel.py``.
    """

    ranks: int
    expert_parallel_size: int
    zero_stage: int
    recompute: tuple[str, ...]
    num_experts: int


CASES = [
    Case(2, 2, 1, ("layer",), num_experts=4),
    Case(2, 2, 3, _PARTS, num_experts=8),
    Case(4, 2, 2, _PARTS, num_experts=8),
]


def _config(case: Case) -> Config:
    """Two micro-batches a rank, of packed rows, with MTP."""
    values = small_config(clip_grad=0.5).model_dump()
    values["run"]["global_batch_size"] = 2 * case.ranks
    values["model"] |= {"mtp_num_layers": 1, "num_experts": case.num_experts, "num_experts_per_tok": _TOP_K}
    values["parallel"] |= {
        "expert_parallel_size": case.expert_parallel_size,
        "zero_stage": case.zero_stage,
        "recompute": list(case.recompute),
    }
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[dict[str, Any]]]:
    """What each rank saw, by case."""
    folder = tmp_path_factory.mktemp("exchange")
    outs = {}
    for num_processes in (2, 4):
        jobs = []
        for index, case in enumerate(case for case in CASES if case.ranks == num_processes):
            outs[case] = folder / f"{num_processes}-{index}"
            outs[case].mkdir()
            jobs.append({"config": _config(case).model_dump(), "out": str(outs[case])})
        path = folder / f"jobs-{num_processes}.json"
        path.write_text(json.dumps(jobs))
        perform("exchange_worker", path, num_processes=num_processes, timeout=600)
    return {
        case: [json.loads((Path(out) / f"rank_{rank}.json").read_text()) for rank in range(case.ranks)]
        for case, out in outs.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_dense_has_the_bits_of_exact(seen: dict[Case, list[dict[str, Any]]], case: Case) -> None:
    for rank in seen[case]:
        assert rank["dispatchers"] == [["AllToAllDispatcher"] * 2, ["DenseDispatcher", "AllToAllDispatcher"]]
        assert rank["dense as exact"]
        assert rank["evaluation"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.zero_stage < 3], ids=lambda case: "-".join(map(str, case))
)
def test_two_micro_batches_in_flight_make_the_same_steps(seen: dict[Case, list[dict[str, Any]]], case: Case) -> None:
    for rank in seen[case]:
        assert rank["overlapped dense as overlapped exact"]
        assert rank["overlapped from exact"] < 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_without_enough_room_is_repeated_and_a_diverged_one_is_not(
    seen: dict[Case, list[dict[str, Any]]], case: Case
) -> None:
    size, num_tokens = case.expert_parallel_size, 48
    most = size * num_tokens * min(_TOP_K, case.num_experts // size)
    for rank in seen[case]:
        assert rank["repeated with more room"]
        # A quarter and 1,024 rows more than were needed is more than there can be.
        assert rank["room"] == most
        assert rank["diverged"][:2] == [True, LITTLE_ROOM]
    assert max(rank["diverged"][2] for rank in seen[case]) > LITTLE_ROOM
