"""The benchmark of saves, on a model of a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.launching import SMALL_MODEL


@pytest.mark.slow
def test_every_kind_of_saves_is_timed_over_whole_intervals(tmp_path: Path) -> None:
    from bench_saves import main

    settings = {**SMALL_MODEL, "run.device": "cpu"}
    overrides = [word for key, value in settings.items() for word in (f"--{key}", value)]
    options = ["--config", "qwen3next_tiny.yaml", "--dir", str(tmp_path), "--json", str(tmp_path / "saves.json")]
    assert main([*options, "--interval", "3", "--accumulation", "1", *overrides]) == 0
    report = json.loads((tmp_path / "saves.json").read_text())
    num_steps = {each["saves"]: len(each["step_s"]) for each in report["results"]}
    assert num_steps == {"none": 3, "beside training": 6, "waited for": 3}
    num_saves = {each["saves"]: (len(each["stopped_s"]), len(each["written_s"])) for each in report["results"]}
    assert num_saves == {"none": (0, 0), "beside training": (2, 2), "waited for": (1, 1)}
    # Twelve bytes a parameter, the generators and the manifest.
    for each in report["results"][1:]:
        assert 12 * report["num_parameters"] < each["num_bytes"] < 13 * report["num_parameters"]
    assert [path.name for path in tmp_path.iterdir()] == ["saves.json"]


@pytest.mark.slow
def test_a_checkpoint_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench_saves import main

    settings = {**SMALL_MODEL, "run.device": "cpu", "optimizer.moments_dtype": "bf16"}
    overrides = [word for key, value in settings.items() for word in (f"--{key}", value)]
    options = ["--config", "qwen3next_tiny.yaml", "--dir", str(tmp_path), "--json", str(tmp_path / "saves.json")]
    assert main([*options, "--read-back", *overrides]) == 0
    report = json.loads((tmp_path / "saves.json").read_text())
    assert 12 * report["num_parameters"] < report["num_bytes"] < 13 * report["num_parameters"]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["written", "verified", "loaded"]
    rates = [report["num_bytes"] / report[f"{name}_s"] / 1e9 for name in ("written", "verified", "loaded")]
    assert [line.split()[-2] for line in lines] == [f"{rate:.2f}" for rate in rates]
    assert [path.name for path in tmp_path.iterdir()] == ["saves.json"]
