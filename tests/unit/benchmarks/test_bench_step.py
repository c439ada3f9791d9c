"""The benchmark of a step on the tiny model: what it counts, and that it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.kernels.routing import TokenPermutation
from tests.architecture.tree import ROOT
from tests.integration.launching import run_forked

SCRIPT = str(ROOT / "scripts" / "benchmarks" / "bench_step.py")


@pytest.mark.parametrize(
    ("name", "whole", "layers"), [("bench_slice4_e512.yaml", 59.1, 28.5), ("bench_ep8_proxy.yaml", 116.1, 85.5)]
)
def test_flops_are_those_of_published_comparisons(name: str, whole: float, layers: float) -> None:
    from bench_shapes import model_flops, random_batch

    config = load_config([find_config(name)]).config
    batch = random_batch(config, packed=False)
    assert batch.num_tokens == 16384
    assert model_flops(config, batch) / 1e12 == pytest.approx(whole, abs=0.05)
    assert model_flops(config, batch, layers_only=True) / 1e12 == pytest.approx(layers, abs=0.05)
    packed = random_batch(config, packed=True)
    assert packed.num_tokens == 16384
    assert len(packed.cu_seqlens_cpu) > 12
    assert model_flops(config, packed) < model_flops(config, batch)


def test_balanced_routing_gives_every_expert_the_same_rows_and_no_token_an_expert_twice() -> None:
    from bench_shapes import Routing

    routing = Routing(TokenPermutation())
    ids_TK = torch.zeros(64, 3, dtype=torch.int64)
    assert routing.sort(ids_TK, 8, 192).counts_E.tolist() == [192, 0, 0, 0, 0, 0, 0, 0]
    routing.balanced = True
    order = routing.sort(ids_TK, 8, 192)
    assert order.counts_E.tolist() == [24] * 8
    expert_R = torch.repeat_interleave(torch.arange(8), 24)
    assert all(len(set(expert_R[rows].tolist())) == 3 for rows in order.row_TK)


@pytest.mark.slow
def test_it_measures_the_tiny_model(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    args = ["--config", "qwen3next_tiny.yaml", "--iters", "1", "--only", "dense/natural", "--profile"]
    args += ["--json", str(target), "--data.sequence_length", "32"]
    done = run_forked(args, program=SCRIPT)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(target.read_text())["results"][0]["outcomes"]
    assert [outcome["case"]["part"] for outcome in outcomes] == ["whole", "layers", *["again"] * 5, "step"]
    again = [outcome["case"]["recompute"] for outcome in outcomes if outcome["case"]["part"] == "again"]
    assert again == [["norms"], ["activations"], ["gdn_prologue"], ["norms", "activations", "gdn_prologue"], ["layer"]]
    assert all(outcome["timing"]["ms"][0] > 0 for outcome in outcomes)
    assert "2 micro-batches; AdamW" in done.stdout


@pytest.mark.slow
def test_it_refuses_what_it_does_not_know() -> None:
    done = run_forked(["--iters", "0"], program=SCRIPT)
    assert (done.returncode, done.stderr) == (2, "error: --iters: give a whole number > 0\n")
