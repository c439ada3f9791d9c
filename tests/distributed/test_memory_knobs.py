"""What saves memory changes nothing else with experts over two ranks either (fp32, CPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import Config
from tests.distributed.layouts import Job, Outcome, largest_relative_error, train_all
from tests.distributed.test_layout_equality import small_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def _config(zero_stage: int, **parallel: Any) -> Config:
    """A step of two micro-batches, on each of two ranks unless they share rows.

    Gradients, norm and update are all that the settings could change; optimizer states that go on for several steps are
    compared in ``tests/unit/engine/test_memory_knobs.py``.
    """
    values = small_config(micro_batch_size=1, steps=1, clip_grad=0.5, scope="global").model_dump()
    shares_rows = {"context_parallel_size", "tensor_parallel_size"} & parallel.keys()
    values["run"]["global_batch_size"] = 2 if shares_rows else 4
    values["parallel"] |= {"expert_parallel_size": 2, "zero_stage": zero_stage, **parallel}
    return Config.model_validate(values)


PARTS: list[list[str]] = [["norms", "activations", "gdn_prologue"], ["layer"]]
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "3 context": (3, {"context_parallel_size": 2}),
    "3 tensor": (3, {"tensor_parallel_size": 2}),
}
"""ZeRO stage and further sizes. Stage 3, which gathers weights again as well, with what else is exchanged again."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every run, by layout and what it saves."""
    configs = {name: _config(stage, **sizes) for name, (stage, sizes) in LAYOUTS.items()}
    configs |= {
        f"{name} {'+'.join(parts)}": _config(stage, **sizes, recompute=parts)
        for name, (stage, sizes) in LAYOUTS.items()
        for parts in PARTS
    }
    configs["2 offload"] = _config(2, offload_optimizer="cpu")
    configs["1 offload tensor"] = _config(1, offload_optimizer="cpu", tensor_parallel_size=2)
    jobs = [Job(config) for config in configs.values()]
    found = train_all(jobs, tmp_path_factory.mktemp("memory") / "runs", num_processes=2)
    return dict(zip(configs, found, strict=True))


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_is_bit_equal(outcomes: dict[str, Outcome], layout: str, parts: list[str]) -> None:
    """Whole layers exchange their tokens again, heads and states too, in the same order on both ranks."""
    expected, found = outcomes[layout], outcomes[f"{layout} {'+'.join(parts)}"]
    assert found.metrics == expected.metrics
    for key, tensor in expected.state.items():
        assert torch.equal(found.state[key], tensor), key


@pytest.mark.parametrize(("other", "offloaded"), [("2", "2 offload"), ("3 tensor", "1 offload tensor")])
def test_an_offloaded_optimizer_takes_the_same_steps(outcomes: dict[str, Outcome], other: str, offloaded: str) -> None:
    """Up to rounding: norms of experts and of divided heads are counted once there as well."""
    for expected, metrics in zip(outcomes[other].metrics, outcomes[offloaded].metrics, strict=True):
        for metric, value in expected.items():
            assert metrics[metric] == pytest.approx(value, rel=1e-6), metric
    for kind in ("master", "exp_avg"):
        error, name = largest_relative_error(outcomes[other], outcomes[offloaded], kind)
        assert error < 1e-5, name
