"""Whole runs on a GPU with an offloaded optimizer, bf16 moments and recompute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.launching import arguments, run, write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Sizes that the CUDA kernels take.
ON_CUDA = {
    "run__device": "cuda",
    "run__precision": "bf16",
    "run__steps": 12,
    "model__hidden_size": 128,
    "model__linear_key_head_dim": 128,
    "model__linear_value_head_dim": 128,
    "model__head_dim": 64,
    "model__moe_intermediate_size": 64,
    "model__shared_expert_intermediate_size": 64,
}


def _losses(corpus: Path, run_dir: Path, **overrides: object) -> list[float]:
    done = run("module", arguments(corpus, run_dir, **ON_CUDA, **overrides))
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss/lm"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        {"parallel__offload_optimizer": "cpu"},
        {"parallel__offload_optimizer": "cpu", "parallel__zero_stage": 2, "optimizer__moments_dtype": "bf16"},
        {"optimizer__moments_dtype": "bf16", "parallel__recompute": "[norms, activations, gdn_prologue]"},
        {"parallel__zero_stage": 3, "parallel__recompute": "[layer]"},
    ],
    ids=["offload", "offload bf16", "bf16 recompute", "zero-3 layer"],
)
def test_the_curve_is_that_of_the_plain_run(tmp_path: Path, overrides: dict[str, object]) -> None:
    corpus = write_corpus(tmp_path)
    expected = _losses(corpus, tmp_path / "plain")
    found = _losses(corpus, tmp_path / "saving", **overrides)
    assert expected[-1] < 0.98 * expected[0]
    assert found == pytest.approx(expected, rel=0.01)
