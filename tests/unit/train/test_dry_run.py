"""``--dry-run``: everything is built, nothing is allocated, and what the first step sees is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3next_train.accounting.workload import count_parameters
from qwen3next_train.batch import PackedRow
from qwen3next_train.cli.main import main
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.data.loader import TrainingData
from qwen3next_train.data.prepare import prepare_stores
from tests.integration.launching import write_corpus


def first_rows(overrides: list[tuple[str, str]], name: str, count: int) -> list[PackedRow]:
    config = load_config([find_config(name)], overrides).config
    data = TrainingData(prepare_stores(config), config)
    return [data.row(sample) for sample in range(count)]


@pytest.mark.parametrize("name", ["qwen3next_tiny.yaml", "qwen3next_80b.yaml"])
def test_dry_run_of_a_shipped_configuration(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 80B would need 160 GB if a single weight were allocated."""
    monkeypatch.chdir(tmp_path)
    corpus = str(write_corpus(tmp_path))
    overrides = [
        *(("data.sources", corpus), ("data.sequence_length", "256"), ("data.validation_fraction", "0")),
        *(("data.validation_sets", f"{{more: {corpus}}}"), ("eval.interval", "5"), ("eval.rows", "3")),
    ]
    argv = ["--config", name, "--dry-run", *(word for key, value in overrides for word in (f"--{key}", value))]
    assert main(argv) == 0
    out = capsys.readouterr().out
    total = count_parameters(load_config([find_config(name)]).config.model).total
    assert f"\nmodel built on the meta device: {total:,} parameters in " in out
    assert out.startswith(f"parameters   {total:,}, active per token ")
    assert "\ngated_delta_rule " in out
    assert re.search(
        r"^validation set more: 40 documents, [\d,]+ tokens\neval/more/loss: 3 rows of 256 tokens$", out, re.M
    )
    shown = {int(row): ends.split() for row, ends in re.findall(r"^  row (\d+): (.*)$", out, re.MULTILINE)}
    expected = first_rows(overrides, name, 8)
    assert shown == {index: [str(end) for end in row.boundaries] for index, row in enumerate(expected)}
    assert all(ends[0] == "0" and ends[-1] == "256" for ends in shown.values())
    assert any(len(ends) > 2 for ends in shown.values()), "the corpus has documents shorter than a row"
    # Nothing of a run is left behind.
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["--data.sources", "missing.txt"], 65, "missing.txt"),
        (["--kernels.fused", "triton", "--run.device", "cpu"], 2, "kernels.fused"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    argv: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "qwen3next_tiny.yaml", "--dry-run", *argv]) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


@pytest.mark.parametrize(("variable", "text"), [("WANDB_MODE", "banana"), ("WANDB_PROJECT", "a/b")])
def test_variables_that_a_run_rejects_are_rejected(
    variable: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    assert main(["--config", "qwen3next_tiny.yaml", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"{variable}: not a ")
