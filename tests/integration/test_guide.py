"""The guide, command by command, on a small corpus and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3next_train.data.tokenization import Tokenizer
from tests.integration.launching import metrics, write_corpus
from tests.integration.pages import Page

pytestmark = pytest.mark.slow

VOCAB_SIZE = 280
STEPS, MORE_STEPS = 6, 8

SMALL = [
    *("--run.global_batch_size=4", "--run.micro_batch_size=2", "--data.sequence_length=64"),
    *(f"--model.vocab_size={VOCAB_SIZE}", "--eval.rows=4", "--data.validation_fraction=0.2"),
]
"""Added to the commands that read a configuration."""


def test_page(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    replaced = {
        "builtin:python-stdlib": str(corpus),
        "--vocab-size 4096": f"--vocab-size {VOCAB_SIZE}",
        "steps: 400": f"steps: {STEPS}",
        "--run.steps 600": f"--run.steps {MORE_STEPS}",
        "--max-new-tokens 100": "--max-new-tokens 10",
        "--max-new-tokens 50": "--max-new-tokens 10",
    }
    page = Page("guide.md", tmp_path, replaced)
    page.write_file("mine.yaml")
    printed = {command: page.run(command, *(SMALL if "--config" in command else [])) for command in page.commands()}

    assert Tokenizer(str(tmp_path / "my-tokenizer")).num_ids == VOCAB_SIZE
    run_dir = tmp_path / "runs" / "first"
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, MORE_STEPS + 1))
    changes = json.loads((run_dir / "run.json").read_text())["changes"]
    assert [(change["key"], change["old"], change["new"]) for change in changes] == [("run.steps", STEPS, MORE_STEPS)]
    written = [text for command, text in printed.items() if " generate " in command]
    assert len(written) == 2, "the two of a checkpoint are one line"
    assert [text[:4] for text in written] == ["clas", "impo"]
    exported = tmp_path / "first-hf"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (tmp_path / "my-tokenizer" / name).read_bytes()
    config = json.loads((exported / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (VOCAB_SIZE, 0)
