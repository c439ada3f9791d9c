"""A checkpoint that transformers wrote, through ours, and back to transformers and vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qwen3next_train.cli.main import main
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.generate.sampling import Sampling
from qwen3next_train.huggingface.export_folder import ExportDtype, export_hf
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.model.init import initial_value
from qwen3next_train.train.evaluate import evaluate_command
from qwen3next_train.train.generate import generate_command
from tests.integration.transformers_child import FIELDS, Transformers
from tests.unit.huggingface.support import assert_bit_equal, read_folder

pytestmark = pytest.mark.slow

DOCUMENTS = [np.random.default_rng(n).integers(0, FIELDS["vocab_size"], n).tolist() for n in (70, 1, 130, 2, 5)]
NUM_TARGETS = sum(len(document) - 1 for document in DOCUMENTS)


@pytest.fixture(scope="module")
def transformers() -> Iterator[Transformers]:
    with Transformers() as process:
        yield process


def loss_of(all_logits: list[npt.NDArray[Any]]) -> float:
    """Mean next-token loss in nats over all documents, float64."""
    total = 0.0
    for logits, document in zip(all_logits, DOCUMENTS, strict=True):
        log_probs = torch.from_numpy(logits).double().log_softmax(-1)
        total -= float(log_probs[:-1].gather(1, torch.tensor(document[1:], dtype=torch.int64).view(-1, 1)).sum())
    return total / NUM_TARGETS


def evaluated(capsys: pytest.CaptureFixture[str], data: Path, **options: Any) -> dict[str, Any]:
    """What ``eval --json`` prints."""
    capsys.readouterr()
    arguments: dict[str, Any] = {"checkpoint": None, "hf": None, "device": "cpu"} | options
    assert evaluate_command(data=str(data), as_json=True, **arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def write_documents(path: Path) -> Path:
    path.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in DOCUMENTS))
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: Transformers, tied: bool) -> None:
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    transformers.save_pretrained(theirs, tie_word_embeddings=tied)
    assert len(list(theirs.glob("*.safetensors"))) > 1
    import_hf(theirs, ours)
    export_hf(ours, back, dtype="fp32", max_shard_bytes=100_000)

    tensors = read_folder(theirs)
    assert ("lm_head.weight" in tensors) != tied
    assert "model.layers.0.mlp.experts.5.up_proj.weight" in tensors
    assert_bit_equal(read_folder(back), tensors)

    expected = transformers.logits(theirs, DOCUMENTS)
    for logits, again in zip(expected, transformers.logits(back, DOCUMENTS), strict=True):
        # Equal weights; the products differ in the last bit with the alignment of the mapped file.
        np.testing.assert_allclose(again, logits, rtol=0, atol=2e-6)

    data = write_documents(tmp_path / "ids.jsonl")
    from_ours = evaluated(capsys, data, checkpoint=ours)
    from_theirs = evaluated(capsys, data, hf=theirs)
    assert from_ours == from_theirs
    assert from_ours["num_tokens"] == NUM_TARGETS
    assert from_ours["loss"] == pytest.approx(loss_of(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: Transformers, dtype: str) -> None:
    """Of bf16 weights an export is the original; of fp32 weights it is what transformers makes of them in bf16."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    transformers.save_pretrained(theirs, dtype=dtype)
    import_hf(theirs, ours)
    export_hf(ours, back)
    if dtype == "bfloat16":
        assert_bit_equal(read_folder(back), read_folder(theirs))
    else:
        kinds = {name: tensor.dtype for name, tensor in read_folder(back).items()}
        assert kinds["model.layers.0.linear_attn.A_log"] == kinds["model.layers.2.mlp.gate.weight"] == torch.float32
        assert kinds["lm_head.weight"] == kinds["model.norm.weight"] == torch.bfloat16
    expected = transformers.logits(theirs, DOCUMENTS, dtype="bfloat16")
    for logits, again in zip(expected, transformers.logits(back, DOCUMENTS, dtype="auto"), strict=True):
        np.testing.assert_array_equal(again, logits)
    data = write_documents(tmp_path / "ids.jsonl")
    found = evaluated(capsys, data, checkpoint=ours, precision="bf16")
    assert found["loss"] == pytest.approx(loss_of(expected), rel=2e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mtp_goes_both_ways_and_transformers_passes_it_over(
    tmp_path: Path, transformers: Transformers, dtype: ExportDtype
) -> None:
    theirs, ours, back, again = (tmp_path / name for name in ("theirs", "ours", "back", "again"))
    transformers.save_pretrained(theirs)
    import_hf(theirs, ours, mtp_num_layers=2, initial_value=lambda spec: initial_value(spec, seed=3))
    export_hf(ours, back, dtype=dtype)
    tensors = read_folder(back)
    assert {"mtp.fc.weight", "mtp.layers.1.mlp.experts.5.down_proj.weight"} <= tensors.keys()
    import_hf(back, again)
    export_hf(again, tmp_path / "back_again", dtype=dtype)
    assert_bit_equal(read_folder(tmp_path / "back_again"), tensors)
    if dtype == "fp32":
        for logits, expected in zip(
            transformers.logits(back, DOCUMENTS), transformers.logits(theirs, DOCUMENTS), strict=True
        ):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["packaged", "trained"])
def test_transformers_reads_the_tokenizer(tmp_path: Path, transformers: Transformers, kind: str) -> None:
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    text = "def f(x):\n    return x + 1  # Grüße, it's 2024\n"
    name = BUILTIN
    if kind == "trained":
        name = str(tmp_path / "trained")
        (tmp_path / "corpus.txt").write_text(text * 3)
        train = ["train-tokenizer", "--sources", str(tmp_path / "corpus.txt"), "--vocab-size", "280", "--output", name]
        assert main(train) == 0
    transformers.save_pretrained(theirs, vocab_size=4096)
    import_hf(theirs, ours)
    export_hf(ours, back, tokenizer=name)
    tokenizer = Tokenizer(name)
    expected = next(tokenizer.encode_documents([text])).tolist()
    assert transformers.tokenize(back, text) == {"ids": expected[:-1], "eos_token": tokenizer.eos_token}


def generated(capsys: pytest.CaptureFixture[str], prompts: list[str], **options: Any) -> list[dict[str, Any]]:
    """What ``generate --json`` prints."""
    capsys.readouterr()
    arguments: dict[str, Any] = {"checkpoint": None, "hf": None, "device": "cpu", "precision": "fp32"} | options
    assert generate_command(prompts=prompts, prompts_file=None, as_json=True, **arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_greedy_ids_are_those_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: Transformers
) -> None:
    """Prompts of 1 to 130 tokens, continued together here and each by itself there."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    transformers.save_pretrained(theirs)
    import_hf(theirs, ours)
    export_hf(ours, back, dtype="fp32")
    expected = [result["ids"] for result in transformers.generate(back, DOCUMENTS, max_new_tokens=40)]
    assert [len(ids) for ids in expected] == [40] * len(DOCUMENTS)
    assert min(len(set(ids)) for ids in expected) > 5
    prompts = [" ".join(map(str, document)) for document in DOCUMENTS]
    for options in ({"checkpoint": ours}, {"hf": back}):
        found = generated(capsys, prompts, **options, sampling=Sampling(40))
        assert [row["token_ids"] for row in found] == expected
        assert [row["text"] for row in found] == [" ".join(map(str, ids)) for ids in expected]


def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], transformers: Transformers
) -> None:
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    transformers.save_pretrained(theirs, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    import_hf(theirs, ours)
    export_hf(ours, back, dtype="fp32", tokenizer=BUILTIN)
    tokenizer = Tokenizer(BUILTIN)
    prompts = ["def f(x):\n    return", "import os", "x", "class Grüße:\n" * 9]
    ids = [encoded.tolist()[:-1] for encoded in tokenizer.encode_documents(prompts)]
    whole = transformers.generate(back, ids, max_new_tokens=24)
    found = generated(capsys, prompts, hf=back, sampling=Sampling(24))
    assert [(row["token_ids"], row["text"]) for row in found] == [(each["ids"], each["text"]) for each in whole]
    assert {row["finish_reason"] for row in found} == {"length"}
