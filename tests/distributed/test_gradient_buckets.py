"""ZeRO-2 in buckets: what each rank holds, in which order it reduces, and that ZeRO-1's gradients come of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3next_train.config.schema import Config
from tests.distributed.bucket_worker import MICRO_BATCHES
from tests.distributed.ranks import perform
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BUCKET_NUMEL = 4000
"""Elements, of 76,000 in the model; the embedding alone has 3,104."""

CASES: dict[str, dict[str, Any]] = {
    "all shared": {},
    "own experts": {"expert_parallel_size": 2},
    "whole layers again, two in flight": {"recompute": ["layer"], "micro_batches_in_flight": 2},
    "bf16 sums": {"gradient_dtype": "bf16"},
}

Seen = list[dict[str, Any]]
"""By rank."""


def _config(parallel: dict[str, Any]) -> Config:
    values = small_config(micro_batch_size=1, clip_grad=0.5).model_dump()
    values["model"] |= {"mtp_num_layers": 1, "num_hidden_layers": 2}
    values["run"] |= {"global_batch_size": 6, "precision": "bf16" if "gradient_dtype" in parallel else "fp32"}
    values["parallel"] |= {"zero_stage": 2, **parallel}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    folder = tmp_path_factory.mktemp("buckets")
    jobs = []
    for name, parallel in CASES.items():
        (folder / name).mkdir()
        config = _config(parallel).model_dump()
        jobs.append({"config": config, "bucket_numel": BUCKET_NUMEL, "out": str(folder / name)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    perform("bucket_worker", folder / "jobs.json", num_processes=2)
    return {
        name: [json.loads((folder / name / f"rank_{rank}.json").read_text()) for rank in range(2)] for name in CASES
    }


def _passes(name: str) -> list[bool]:
    """Of each backward pass, whether it is its step's last."""
    in_flight = CASES[name].get("micro_batches_in_flight", 1)
    return [done == -(-count // in_flight) for count in MICRO_BATCHES for done in range(1, -(-count // in_flight) + 1)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_stage_1(seen: dict[str, Seen], name: str) -> None:
    """Sums are of the same numbers in another order; steps of one, three and two micro-batches, not all with MTP."""
    bound = 1e-2 if name == "bf16 sums" else 1e-6
    for rank in seen[name]:
        assert rank["error"] < bound
        assert rank["norms"] == pytest.approx(rank["norms of stage 1"], rel=bound)
        assert rank["repeats"], "another training of the same gives other bits"


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_reduce_in_one_order_and_every_bucket_in_each_pass(seen: dict[str, Seen], name: str) -> None:
    """Also a bucket of which a rank has no gradient; what no other rank shares has its turn in the step's last pass."""
    first, second = seen[name]
    assert first["launched"] == second["launched"]
    lent = {index for index, num_bytes in enumerate(first["lent"]) if num_bytes}
    everything = set(range(len(first["lent"])))
    assert (lent < everything) == (name == "own experts")
    for launched, under_stage_1, is_last in zip(
        first["launched"], first["launched under stage 1"], _passes(name), strict=True
    ):
        assert len(launched) == len(set(launched))
        assert set(launched) == (everything if is_last else lent)
        assert set(under_stage_1) == (everything if is_last else set())
    order = first["launched"][0]
    assert all(launched == [index for index in order if index in launched] for launched in first["launched"])


@pytest.mark.parametrize("name", CASES)
def test_only_partitions_are_held_between_passes(seen: dict[str, Seen], name: str) -> None:
    """Beside what is under way; in a pass, the first of all included, no more than is planned."""
    for rank in seen[name]:
        assert rank["between"] == [0] * len(_passes(name))
        assert min(rank["peaks"]) > 0
        # Rank 1 waits for MTP's gradients to the end of the third pass, and the buckets behind those do.
        peaks = [peak for index, peak in enumerate(rank["peaks"]) if index != 2]
        assert max(peaks) <= rank["counted"]["zero_buffers"]
        assert max(peaks) < 0.5 * sum(rank["lent"])
    assert rank["partitions"] == pytest.approx(rank["counted"]["gradients"], rel=0.01)
