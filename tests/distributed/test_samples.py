"""Text written between steps changes no bit of them, at any layout, and is that of one rank (fp32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, dict[str, Any]] = {
    "experts, dense exchange": {"expert_parallel_size": 2, "token_exchange": "dense"},
    "context, two in flight": {
        "context_parallel_size": 2,
        "micro_batches_in_flight": 2,
        "recompute": ["norms", "activations", "gdn_prologue"],
    },
    "tensor, experts, zero 2": {"tensor_parallel_size": 2, "expert_parallel_size": 2, "zero_stage": 2},
    "context, experts, zero 3": {"context_parallel_size": 2, "expert_parallel_size": 2, "zero_stage": 3},
}


def config_of(layout: dict[str, Any]) -> Config:
    """Two steps of two rows with an MTP depth; weights large enough that greedy text is no repetition of a token."""
    values = small_config(steps=2, clip_grad=0.5).model_dump()
    values["model"] |= {"mtp_num_layers": 1, "initializer_range": 0.4}
    values["run"]["global_batch_size"] = 2
    values["parallel"] |= layout
    return Config.model_validate(values)


def outcomes(folder: Path, layouts: dict[str, dict[str, Any]], num_processes: int) -> dict[str, list[dict[str, Any]]]:
    """By layout, what each rank found."""
    folder.mkdir()
    jobs = []
    for number, layout in enumerate(layouts.values()):
        (folder / str(number)).mkdir()
        jobs.append({"config": config_of(layout).model_dump(), "out": str(folder / str(number))})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    perform("samples_worker", folder, num_processes=num_processes)
    return {
        name: [json.loads((folder / str(number) / f"rank_{rank}.json").read_text()) for rank in range(num_processes)]
        for number, name in enumerate(layouts)
    }


def test_no_layout_is_disturbed_by_what_it_writes(tmp_path: Path) -> None:
    ((one,),) = outcomes(tmp_path / "1", {"one": {}}, 1).values()
    assert one["plain"]["metrics"] == one["sampled"]["metrics"]
    # Behind one step, whose weights differ between layouts by rounding: greedy, then drawn.
    expected = one["sampled"]["texts"][:2]
    assert all(len(set(ids)) > 2 for ids in expected[0])
    for name, ranks in outcomes(tmp_path / "2", LAYOUTS, 2).items():
        for found in ranks:
            assert found["plain"]["metrics"] == found["sampled"]["metrics"], name
            assert len(found["plain"]["metrics"]) == 2
            assert len(found["sampled"]["texts"]) == 4
            assert found["sampled"]["texts"][:2] == expected, name
            assert found["sampled"]["texts"] == ranks[0]["sampled"]["texts"], name
