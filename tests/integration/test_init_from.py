"""A run's weights out to Hugging Face's format, back, and into new runs: exactly the weights, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.accounting.workload import workload_of
from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.weights import weights_of_checkpoint
from qwen3next_train.cli.main import main
from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import Config
from qwen3next_train.data.loader import TrainingData
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.train.finished_model import load_model
from tests.integration.launching import (
    arguments,
    exit_codes,
    exit_record,
    metrics,
    run_forked,
    start_ranks,
    write_corpus,
)
from tests.unit.huggingface.support import read_folder

pytestmark = pytest.mark.slow

# With a constant rate a run may be made longer after it ended.
CONSTANT = {"schedule__kind": "constant"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    done = run_forked(arguments(corpus, run_dir, run__steps=4, run__seed=1))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights, exported to Hugging Face's format and imported again."""
    folder = tmp_path_factory.mktemp("formats")
    assert main(["export-hf", f"--checkpoint={source}", "--output", str(folder / "hf"), "--dtype", "fp32"]) == 0
    assert "mtp.layers.0.mlp.experts.3.down_proj.weight" in read_folder(folder / "hf")
    assert main(["import-hf", "--hf", str(folder / "hf"), "--output", str(folder / "ours")]) == 0
    return folder / "ours"


@pytest.fixture(scope="module")
def started(corpus: Path, imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps from the imported weights, at one go."""
    run_dir = tmp_path_factory.mktemp("started") / "run"
    done = run_forked(arguments(corpus, run_dir, checkpoint__init_from=imported, **CONSTANT))
    assert done.returncode == 0, done.stderr
    assert f"new run with the weights of {imported}/checkpoints/step_00000000" in done.stderr
    return run_dir


def config_of(run_dir: Path) -> Config:
    return load_config([run_dir / "config.yaml"]).config


def loss_of_first_step(weights: Path, config: Config) -> float:
    """Mean next-token loss of finished weights over the rows of the first step, without engine and loop."""
    model = load_model(weights_of_checkpoint(weights), device=torch.device("cpu"), dtype=torch.float32, command="eval")
    data = TrainingData(prepare_stores(config), config)
    rows = [data.row(sample) for sample in range(config.run.global_batch_size)]
    batch = PackedBatch.from_rows(rows, mtp_depths=0)
    with torch.inference_mode():
        return float(model.next_token_nll(batch)) / batch.num_targets[0]


def test_first_loss_is_that_of_the_weights(source: Path, started: Path) -> None:
    first = metrics(started)[0]
    assert first["step"] == 1
    assert first["tokens"] == 4 * 64
    assert first["loss/lm"] == pytest.approx(loss_of_first_step(source, config_of(started)), rel=1e-6)
    # Four steps of training have left the loss of random weights well behind.
    assert first["loss/lm"] < metrics(source)[0]["loss/lm"] - 0.2


def test_moments_and_counters_start_afresh_and_a_resumed_run_goes_on(
    corpus: Path, source: Path, started: Path, tmp_path: Path
) -> None:
    """From the training checkpoint, which has moments, counters and generators of its own, in two attempts."""
    run_dir = tmp_path / "run"
    done = run_forked(arguments(corpus, run_dir, checkpoint__init_from=source, run__steps=3, **CONSTANT))
    assert done.returncode == 0, done.stderr
    # Not read any more: the run has a checkpoint.
    gone = tmp_path / "gone"
    done = run_forked(arguments(corpus, run_dir, checkpoint__init_from=gone, **CONSTANT))
    assert done.returncode == 0, done.stderr
    assert "resumed from step 3" in done.stderr
    assert "checkpoint.init_from is not read: run.dir has a checkpoint" in done.stderr
    assert metrics(run_dir) == metrics(started)


def test_run_without_a_checkpoint_refuses_other_weights(
    corpus: Path, source: Path, started: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(started, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    done = run_forked(arguments(corpus, run_dir, checkpoint__init_from=source, **CONSTANT))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    was = config_of(started).checkpoint.init_from
    assert line == (
        f"checkpoint.init_from: was {was}, now {source}: {run_dir} belongs to another configuration; go on with the "
        "change by --resume.accept checkpoint.init_from, or choose another run.dir"
    )


@pytest.mark.dist
def test_two_ranks_start_together_and_fail_together(
    corpus: Path, imported: Path, started: Path, tmp_path: Path
) -> None:
    args = arguments(corpus, tmp_path / "run", checkpoint__init_from=imported, run__steps=2, **CONSTANT)
    assert exit_codes(start_ranks([args, args])) == [0, 0]
    for row, alone in zip(metrics(tmp_path / "run"), metrics(started), strict=False):
        assert row["loss/lm"] == pytest.approx(alone["loss/lm"], rel=1e-5)
    args = arguments(corpus, tmp_path / "other", checkpoint__init_from=imported, model__mtp_num_layers=0)
    assert exit_codes(start_ranks([args, args])) == [65, 65]
    record = exit_record(tmp_path / "other")
    assert record["code"] == 65
    assert record["reason"].startswith(
        f"checkpoint.init_from: {imported}/checkpoints/step_00000000: checkpoint of another model: "
        "model.mtp_num_layers was 1, now 0; use the model section of the run that wrote it"
    )


def test_run_json_tells_size_and_work(source: Path) -> None:
    info: dict[str, Any] = json.loads((source / "run.json").read_text())
    config = config_of(source)
    workload = workload_of(config)
    assert {name: info[name] for name in ("parameters", "flops", "flops_megatron")} == workload.as_json()
    weights = weights_of_checkpoint(source)
    assert info["parameters"]["total"] == sum(spec.numel for spec in weights.parameters)
    # The corpus has documents shorter than a row, so a step's attention is a little less than that of full rows.
    for row in metrics(source):
        assert 0.98 * workload.flops_per_step < row["perf/flops_per_step"] <= workload.flops_per_step


def test_eval_of_a_run_and_of_its_exports(
    corpus: Path, source: Path, imported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for model in (f"--checkpoint={source}", f"--checkpoint={imported}", f"--hf={imported.parent / 'hf'}"):
        capsys.readouterr()
        assert main(["eval", model, "--data", str(corpus), "--json", "--data.sequence_length=64", "--device=cpu"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1] == results[2]
    assert set(results[0]) == {"loss", "bpb", "num_tokens"}
