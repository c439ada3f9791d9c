"""The plot subcommand: what it writes and prints, and how it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from tests.unit.plots.runs import row, write_run

ROWS = [row(1, loss_lm=8.0, perf_tokens_per_s=10.0), row(2, loss_lm=6.0, perf_tokens_per_s=20.0)]


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))


def test_two_files_are_written_beside_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_run(tmp_path / name, ROWS) for name in ("one", "two"))
    assert main(["plot", str(one), str(two)]) == 0
    assert capsys.readouterr().out == f"{one}/curves.png\n{one}/curves.svg\n"
    assert (one / "curves.svg").read_bytes().startswith(b"<?xml")
    assert sorted(path.name for path in two.iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize("output", ["v1.2", "v1.2.png", "v1.2.svg"])
def test_output_names_the_files(tmp_path: Path, output: str) -> None:
    run = write_run(tmp_path / "one", ROWS)
    assert main(["plot", str(run), "--output", str(tmp_path / output)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "v1.2.png", "v1.2.svg"]


def test_text_needs_no_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, without_matplotlib: None
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["plot", str(write_run(tmp_path / "one", ROWS)), "--text", "--axis", "tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "next-token loss, nats per token"
    assert lines[1] == "         8 |**"
    assert lines[14] == "            100               200 tokens"
    assert lines[15] == "         *  one, last 6"
    assert lines[17] == "rate, tokens/s"


def test_without_the_library_its_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_matplotlib: None
) -> None:
    assert main(["plot", str(write_run(tmp_path / "one", ROWS))]) == 2
    assert capsys.readouterr().err == (
        "plot: matplotlib is not installed; pip install 'qwen3next-train[matplotlib]', or draw text with --text\n"
    )


def test_without_the_library_a_terminal_gets_text(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    without_matplotlib: None,
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["plot", str(write_run(tmp_path / "one", ROWS))]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("next-token loss")
    assert "qwen3next-train[matplotlib]" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "plot: which run? (got nothing)"),
        (["absent"], 2, "absent: does not exist"),
        (["empty"], 2, "empty/metrics.jsonl: has no row yet"),
        (["one", "--text", "--html"], 2, "plot: --text and --html are two kinds of output"),
        (["one", "--smooth", "1"], 2, "--smooth: not a number > 0 and <= 0.999"),
        (["one", "--axis", "time"], 2, "--axis: not one of the choices (got 'time'); give one of steps, tokens"),
        (["one", "--run.steps", "5"], 2, "--run.steps: not read by plot"),
        (["damaged"], 65, "damaged/metrics.jsonl: line 1 is damaged"),
        (["one", "--output", "absent/x"], 74, "absent/x.png: cannot be written"),
        (["nothing"], 2, "nothing: no metric that is plotted has a finite value"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    write_run(tmp_path / "one", ROWS)
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "nothing", [row(1, loss_lm=None)])
    (write_run(tmp_path / "damaged", []) / "metrics.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(text)
    assert len(error.splitlines()) == 1
