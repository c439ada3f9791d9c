"""The page on continued pretraining, command by command, on a random model of the released type and little text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.config.schema import Config
from qwen3next_train.data.blend import Blend
from tests.integration.launching import metrics
from tests.integration.pages import Page
from tests.unit.huggingface.support import random_tensors, read_folder, tiny_model, write_folder

pytestmark = pytest.mark.slow

VOCAB_SIZE = 280
STEPS, WARMUP, BATCH = 8, 3, 4
PEAK, FLOOR = 2e-2, 2e-3
REPLACED = {
    "steps: 2000": f"steps: {STEPS}",
    "global_batch_size: 1024": f"global_batch_size: {BATCH}",
    "weight: 19": "weight: 3",
    "lr: 3e-5": f"lr: {PEAK}",
    "min_lr: 3e-6": f"min_lr: {FLOOR}",
    "warmup_steps: 100": f"warmup_steps: {WARMUP}",
    "interval: 200": "interval: 4",
    "--gpus 64": "--gpus 2",
}
"""On the page, in the test."""

SMALL = ["--run.device=cpu", "--run.precision=fp32", "--run.micro_batch_size=2", "--data.sequence_length=64"]


def write_texts(folder: Path, word: str) -> None:
    folder.mkdir()
    for index in range(20):
        lines = [f"{word} {index} has {line} {word}s and the {line} others\n" for line in range(12)]
        (folder / f"{index:02d}.txt").write_text("".join(lines))


def write_released(folder: Path, tokenizer: Path) -> None:
    """A folder as it is published: weights, MTP's included, and a tokenizer."""
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=64, mtp_num_layers=1)
    tensors = {name: 0.05 * tensor for name, tensor in random_tensors(model).items()}
    write_folder(folder, model, tensors, shards=2)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, word in {"mine": "stone", "general": "river"}.items():
        write_texts(tmp_path / name, word)
        (tmp_path / f"held_out_{name}.txt").write_text(f"{word} 77 has 5 {word}s and the 9 others\n" * 30)
    tokenizer = ["--sources", f"[{tmp_path / 'mine'}, {tmp_path / 'general'}]", "--vocab-size", str(VOCAB_SIZE)]
    assert main(["train-tokenizer", *tokenizer, "--output", str(tmp_path / "tokenizer")]) == 0
    released = tmp_path / "Qwen3-Next-80B-A3B-Instruct"
    write_released(released, tmp_path / "tokenizer")

    page = Page("continued-pretraining.md", tmp_path, REPLACED)
    page.write_file("mine.yaml")
    losses = []
    for command in page.commands():
        reads_config = "--config" in command
        printed = page.run(command, *(SMALL if reads_config else ["--json"] if " eval " in command else []))
        if " eval " in command:
            losses.append(json.loads(printed)["loss"])
    before, after = losses
    assert before == pytest.approx(math.log(VOCAB_SIZE), rel=0.1), "random weights know nothing"
    assert after < before - 0.3

    rows = metrics(tmp_path / "runs" / "continued")
    cosine = [0.5 * (1 + math.cos(math.pi * step / (STEPS - WARMUP))) for step in range(1, STEPS - WARMUP + 1)]
    rates = [PEAK / 3, 2 * PEAK / 3, PEAK, *(FLOOR + (PEAK - FLOOR) * share for share in cosine)]
    assert [row["optim/lr"] for row in rows] == pytest.approx(rates)
    # The weights come along, MTP's too, and nothing of them is lost before the first update.
    assert rows[0]["loss/lm"] == pytest.approx(before, rel=0.05)
    assert rows[0]["loss/mtp"] == pytest.approx(math.log(VOCAB_SIZE), rel=0.1)
    dealt = [Blend([3, 1], seed=Config().run.seed).locate(sample)[0] for sample in range(STEPS * BATCH)]
    shares = [dealt[step * BATCH : (step + 1) * BATCH].count(0) / BATCH for step in range(STEPS)]
    assert 0 < dealt.count(1) < dealt.count(0)
    assert [row["data/share_mine"] for row in rows] == shares
    for name in ("mine", "general"):
        assert rows[-1][f"eval/{name}/loss"] < rows[3][f"eval/{name}/loss"] < before

    exported = tmp_path / "continued-hf"
    assert json.loads((exported / "config.json").read_text())["model_type"] == "qwen3_next"
    assert (exported / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
    assert (exported / "tokenizer_config.json").read_bytes() == (released / "tokenizer_config.json").read_bytes()
    assert read_folder(exported).keys() == read_folder(released).keys()
