"""The report: one file that holds everything, and that a browser shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.plots.html import html_report
from qwen3next_train.plots.runs import read_runs
from tests.unit.plots.runs import row, write_run

SVG = b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg viewBox="0 0 4 3"><path d="M 0 0"/></svg>\n'
VOID = {"meta", "path"}


class Reader(HTMLParser):
    """Cells of tables by row, texts by tag, what is referred to; tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, str] = {}
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [row(1, loss_lm=8.0, perf_flops_total=1e12), row(2, loss_lm=6.0), row(3, loss_lm=7.0, eval_loss=6.5)]
    rows[2]["eval/code/bpb"] = 1.5
    folder = write_run(tmp_path / "a<b&c", rows, first_steps=(0, 2))
    (folder / "config.yaml").write_text("run:\n  dir: '<script>alert(1)</script>'\n")
    (folder / "exit.json").write_text(json.dumps({"code": 75, "reason": "stopped on SIGTERM after step 3"}))
    return folder


def test_a_report_says_what_is_known_of_a_run(folder: Path) -> None:
    text = html_report(read_runs([folder]), SVG).decode()
    report = Reader(text)
    values = {cells[0]: cells[1] for cells in report.rows if len(cells) == 2}
    assert values["steps"] == "3"
    assert values["tokens"] == "300"
    assert values["loss"] == "7.0000 at step 3, best 6.0000 at step 2"
    assert values["validation loss"] == "6.5000 at step 3, best 6.5000 at step 3"
    assert values["eval/code/bpb"] == "1.5000 at step 3, best 1.5000 at step 3"
    assert values["resumed at"] == "step 2"
    assert values["newest checkpoint"] == "none"
    assert values["end"] == "stopped on SIGTERM after step 3 (75)"
    assert values["torch"] == "2.13.0"
    assert [cells[2] for cells in report.rows if len(cells) == 4] == ["first step", "0", "2"]
    # What people write is shown, not run.
    assert report.texts["title"] == report.texts["h2"] == "a<b&c"
    assert report.texts["pre"] == "run:\n  dir: '<script>alert(1)</script>'\n"
    assert "<script" not in text
    # The picture is in the file, without what only a file of its own may begin with.
    assert text.count("<!DOCTYPE") == 1
    assert '<svg viewBox="0 0 4 3">' in text
    assert report.references == []


def test_the_best_validation_is_of_the_rows_that_were_looked_at_last(tmp_path: Path) -> None:
    rows = [row(step, eval_loss=loss) for step, loss in ((1, 2.0), (2, 4.0), (3, 5.0))]
    folder = write_run(tmp_path / "run", rows, first_steps=(0, 1))
    for digests, line in (
        (("a", "a"), "5.0000 at step 3, best 2.0000 at step 1"),
        (("a", "b"), "5.0000 at step 3, best 4.0000 at step 2"),
        ((None, "b"), "5.0000 at step 3, best 4.0000 at step 2"),
        ((None, None), "5.0000 at step 3, best 2.0000 at step 1"),
    ):
        info = json.loads((folder / "run.json").read_text())
        for attempt, digest in zip(info["attempts"], digests, strict=True):
            attempt["validation_rows"] = None if digest is None else {"eval/": digest}
        (folder / "run.json").write_text(json.dumps(info))
        report = Reader(html_report(read_runs([folder]), SVG).decode())
        assert [cells[1] for cells in report.rows if cells[0] == "validation loss"] == [line]
    # An attempt that has not validated its other rows yet.
    info["attempts"].append({"first_step": 3, "validation_rows": {"eval/": "c"}})
    (folder / "run.json").write_text(json.dumps(info))
    assert "validation loss" not in html_report(read_runs([folder]), SVG).decode()


def test_a_run_of_which_little_is_known_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss/lm": null}\n')
    (folder / "exit.json").write_text("[")
    report = Reader(html_report(read_runs([folder]), SVG).decode())
    values = {cells[0]: cells[1] for cells in report.rows}
    assert (values["steps"], values["tokens"], values["end"]) == ("5", "unknown", "not yet, or not recorded")
    assert "loss" not in values


def test_the_command_writes_one_file_that_loads_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(folder), "--html"]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    report = Reader((folder / "report.html").read_text())
    # Marks and clips are referred to within the file; the map of experts would be a data: URL.
    assert all(reference.startswith(("#", "data:")) for reference in report.references)
    assert "next-token loss, nats per token" in report.texts["text"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_report(folder: Path, tmp_path: Path) -> None:
    assert main(["plot", str(folder), "--html", "--output", str(tmp_path / "shown")]) == 0
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/shown.html"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    report = Reader(shown.stdout)
    assert report.texts["h1"] == "a<b&c"
    # The parser of the browser has taken the picture for one, with the curve's three points in it.
    figure = shown.stdout.split('<figure id="curves">')[1].split("</figure>")[0]
    curve = figure.split('<g id="a&lt;b&amp;c">')[1].split('d="')[1].split('"')[0]
    assert curve.split()[::3] == ["M", "L", "L"]
    # It says on the console what it has refused to load or run.
    assert "Content Security Policy" not in shown.stderr
