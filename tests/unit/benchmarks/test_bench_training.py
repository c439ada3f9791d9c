"""The benchmark of training on real rows, on a model of a few seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3next_train.errors import ConfigError
from tests.integration.launching import SMALL_MODEL, exit_codes, start_ranks, write_corpus


def _run_forked(command: list[str], *, check: bool) -> SimpleNamespace:
    """What torchrun would start for real."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert command[: len(launcher)] == launcher
    script, *args = command[len(launcher) :]
    assert exit_codes(start_ranks([args, args], program=script)) == [0, 0]
    return SimpleNamespace(returncode=0)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_and_report_what_a_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_training
    from bench_training import main

    monkeypatch.setattr(bench_training, "subprocess", SimpleNamespace(run=_run_forked))
    settings = {**SMALL_MODEL, "run.device": "cpu", "run.global_batch_size": "2", "run.micro_batch_size": "1"}
    settings |= {"parallel.expert_parallel_size": "2", "data.sequence_length": "64"}
    settings["data.sources"] = str(write_corpus(tmp_path))
    overrides = [word for key, value in settings.items() for word in (f"--{key}", value)]
    target = tmp_path / "report.json"
    options = ["--config", "qwen3next_tiny.yaml", "--gpus", "2", "--steps", "7", "--json", str(target)]
    assert main([*options, *overrides]) == 0
    report = json.loads(target.read_text())
    assert (report["num_gpus"], report["tokens"], report["skipped"]) == (2, 2 * 64, 0)
    assert len(report["loss"]) == len(report["grad_norm"]) == len(report["step_s"]) == 7
    # Uniform over the vocabulary before the first step.
    assert report["loss"][0] == pytest.approx(8.318, abs=0.05)
    assert report["loss"][-1] < report["loss"][0]
    # The first five steps are left out of rate and median.
    assert report["median_s"] == pytest.approx(sum(report["step_s"][5:]) / 2)
    assert report["tflops"] == pytest.approx(report["flops"] / 2 / report["median_s"] / 2 / 1e12)
    assert report["parts"]["AdamW"] > 0
    assert report["plan_bytes"] > 4 * report["num_parameters"] / 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "--config: name a configuration"),
        (["--config", "qwen3next_tiny.yaml", "--steps", "x"], "--steps: give a whole number > 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(argv: list[str], line: str) -> None:
    from bench_training import main

    with pytest.raises(ConfigError, match=line):
        main(argv)
