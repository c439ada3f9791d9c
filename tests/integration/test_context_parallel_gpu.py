"""Whole runs in bf16 whose rows, or heads, are over two and four GPUs, against one GPU with whole rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integration.launching import arguments, run, write_corpus
from tests.integration.test_memory_knobs_gpu import ON_CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BAND = 0.01
"""Relative difference of the loss at any step: as between one GPU with and without recompute, by rounding in bf16."""
HEADS = {
    "model__num_attention_heads": 4,
    "model__num_key_value_heads": 2,
    "model__linear_num_key_heads": 2,
    "model__linear_num_value_heads": 4,
}
"""Enough for four ranks."""
FOUR = {"parallel__expert_parallel_size": 2, "parallel__recompute": "[layer]"}
LAYOUTS = {
    "2 slices": (2, {"parallel__context_parallel_size": 2}),
    "4 slices": (4, {"parallel__context_parallel_size": 4, **FOUR}),
    "2 shares of heads": (2, {"parallel__tensor_parallel_size": 2}),
    "2 slices, 2 shares of heads": (
        4,
        {"parallel__context_parallel_size": 2, "parallel__tensor_parallel_size": 2, **FOUR},
    ),
}


def _losses(corpus: Path, run_dir: Path, num_gpus: int, **overrides: object) -> list[float]:
    # A state that lasts as long as a row, so that it matters whether it is passed.
    lasting = {"model__linear_dt_init": "log_uniform", "run__global_batch_size": 8, "run__micro_batch_size": 1}
    words = arguments(corpus, run_dir, **ON_CUDA, **HEADS, **lasting, **overrides)
    done = run("module", words, num_processes=num_gpus)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss/lm"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("num_gpus", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_curve_is_that_of_one_gpu(tmp_path: Path, num_gpus: int, layout: dict[str, object]) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    corpus = write_corpus(tmp_path)
    expected = _losses(corpus, tmp_path / "one", 1)
    found = _losses(corpus, tmp_path / "several", num_gpus, **layout)
    assert expected[-1] < 0.98 * expected[0]
    assert found == pytest.approx(expected, rel=BAND)
