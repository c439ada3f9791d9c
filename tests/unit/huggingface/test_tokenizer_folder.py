"""``train-tokenizer``: the folder that it writes, and what it refuses before it has read anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.data.tokenization import Tokenizer
from tests.architecture.tree import ROOT

VOCAB_SIZE = 280


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(10):
        (folder / f"{index}.txt").write_text(f"document {index} of the corpus says the same as the others\n" * 3)
    return folder


def command(corpus: Path, output: Path, *more: str) -> list[str]:
    return ["train-tokenizer", f"--sources={corpus}", f"--vocab-size={VOCAB_SIZE}", f"--output={output}", *more]


def test_folder_is_taken_by_the_data_path(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "tokenizer"
    assert main(command(corpus, output)) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert lines == [
        f"{output}: 280 tokens from 10 documents, {size / 1000:.1f} kB",
        f"to use it: --data.tokenizer {output} --model.vocab_size 280",
    ]
    assert sorted(path.name for path in output.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer"]
    assert json.loads((output / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    tokenizer = Tokenizer(str(output))
    assert (tokenizer.num_ids, tokenizer.eos_token_id) == (VOCAB_SIZE, 0)
    assert "by tokenizer_config.json" in tokenizer.describe(VOCAB_SIZE)
    (ids,) = tokenizer.encode_documents(["the corpus <|endoftext|>"])
    assert ids.tolist().count(0) == 1, "only the end of the document, not text that spells it"


def test_another_process_writes_the_same_file(tmp_path: Path, corpus: Path) -> None:
    """Its hash tables are seeded otherwise."""
    assert main(command(corpus, tmp_path / "here")) == 0
    argv = [sys.executable, "-m", "qwen3next_train", *command(corpus, tmp_path / "there")]
    subprocess.run(argv, check=True, cwd=ROOT, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_configuration_gives_sources_and_size(tmp_path: Path, corpus: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"model: {{vocab_size: 275}}\ndata: {{sources: [{{source: {corpus}, weight: 3}}]}}\n")
    assert main(["train-tokenizer", f"--config={config}", f"--output={tmp_path / 'out'}"]) == 0
    assert Tokenizer(str(tmp_path / "out")).num_ids == 275


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder"])
def test_nothing_is_replaced(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        if kind == "folder":
            (output / "tokenizer.json").write_text("mine")
    # Before a source is opened.
    (corpus / "0.txt").chmod(0)
    assert main(command(corpus, output)) == 2
    assert capsys.readouterr().err == f"train-tokenizer: {output} exists; remove it or choose another output\n"
    if kind != "empty folder":
        assert (output if kind == "file" else output / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "code", "reason"),
    [
        (["--vocab-size=300", "--output=out"], 2, "--sources: missing; give the text to train on"),
        (["--sources=corpus", "--output=out"], 2, "--vocab-size: missing; give the number of tokens, such as 32768"),
        (["--sources=corpus", "--vocab-size=300"], 2, "--output: missing; give a folder"),
        (["--sources=corpus", "--vocab-size=12", "--output=out"], 2, "model.vocab_size: 12 is too small for a tok"),
        (
            ["--sources=corpus", "--vocab-size=many", "--output=out"],
            2,
            "--vocab-size (model.vocab_size): not a whole n",
        ),
        (["--sources=corpus", "--vocab-size=9999", "--output=out"], 2, "model.vocab_size: 1.6 kB of text give no "),
        (["--sources=none.txt", "--vocab-size=300", "--output=out"], 65, "none.txt: no such file, folder or token"),
        (
            ["--sources=corpus", "--data.sources=b", "--vocab-size=300", "--output=out"],
            2,
            "train-tokenizer: --sources and ",
        ),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train-tokenizer", *argv]) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(reason)
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
