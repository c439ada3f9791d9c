"""A non-finite gradient of one rank is skipped by all, at every stage, precision, layout and with offload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CASES = [
    # ZeRO stage, precision, expert-parallel size, offload, context-parallel size.
    (1, "bf16", 2, "none", 1),
    (1, "fp32", 1, "none", 2),
    (2, "bf16", 2, "none", 1),
    (2, "fp32", 1, "none", 2),
    (3, "bf16", 2, "none", 1),
    (3, "fp32", 1, "none", 2),
    (1, "bf16", 1, "cpu", 1),
    (1, "fp32", 2, "cpu", 1),
    (2, "bf16", 1, "cpu", 1),
    (2, "fp32", 2, "cpu", 1),
]
"""Every pair of a place of the state (stage and offload) and a precision or expert-parallel size, and of these two."""


def _config(
    zero_stage: int, precision: str, expert_parallel_size: int, offload: str, context_parallel_size: int
) -> Config:
    """Two micro-batches without MTP, on each of two ranks unless they share rows.

    Not clipped where experts are not spread, where the norm decides too.
    """
    values = small_config(micro_batch_size=1, clip_grad=0.5 if expert_parallel_size == 2 else 0.0).model_dump()
    values["run"] |= {"precision": precision, "global_batch_size": 4 // context_parallel_size}
    values["model"]["mtp_num_layers"] = 0
    values["parallel"] |= {
        "expert_parallel_size": expert_parallel_size,
        "zero_stage": zero_stage,
        "offload_optimizer": offload,
        "context_parallel_size": context_parallel_size,
    }
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """What each rank saw, by case."""
    folder = tmp_path_factory.mktemp("skip")
    jobs = []
    for index, case in enumerate(CASES):
        out = folder / str(index)
        out.mkdir()
        jobs.append({"config": _config(*case).model_dump(), "out": str(out)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    perform("skip_worker", folder / "jobs.json", num_processes=2)
    return {
        case: [json.loads((Path(job["out"]) / f"rank_{rank}.json").read_text()) for rank in range(2)]
        for case, job in zip(CASES, jobs, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_state_stays_bit_equal_and_the_next_step_is_as_if_nothing_had_been(
    seen: dict[tuple[Any, ...], list[dict[str, Any]]], case: tuple[Any, ...]
) -> None:
    for rank in seen[case]:
        assert rank == {
            "skipped": [False, True, True, False],
            # Weights and moments, and the weights that the model computes with, after each of the two.
            "changed": [[], []],
            "norms": ["inf", "inf"],
            "updates": [2],
            "same_without_skips": True,
        }
