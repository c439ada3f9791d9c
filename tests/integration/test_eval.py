"""The ``eval`` subcommand on small random weights."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.checkpoint.weights import weights_of_checkpoint
from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.data.store_writer import StoreWriter
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.errors import ConfigError, DataError, DivergedError
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.huggingface.names import on_disk
from qwen3next_train.huggingface.weights import weights_of_hf
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from qwen3next_train.train import evaluate as evaluate_module
from qwen3next_train.train import finished_model
from qwen3next_train.train.evaluate import evaluate_command
from qwen3next_train.train.finished_model import load_model
from tests.unit.huggingface.support import random_tensors, tiny_model, write_folder

CPU = torch.device("cpu")
VOCAB = 4096
LENGTHS = (40, 1, 7, 100, 2, 65)


@pytest.fixture(scope="module")
def model() -> Qwen3NextForCausalLM:
    config = tiny_model(vocab_size=VOCAB, initializer_range=0.5)
    with torch.device("meta"):
        built = Qwen3NextForCausalLM(config, kernels=select_kernels(KernelsConfig(), CPU))
    initialize(built, parameter_table(config), seed=1, topology=Topology(), device=CPU)
    return built


@pytest.fixture(scope="module")
def folder(model: Qwen3NextForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parameters = {name: parameter.detach().reshape(-1) for name, parameter in model.named_parameters()}
    tensors = {
        tensor.name: parameters[spec.name][tensor.start : tensor.stop].view(tensor.shape).clone()
        for spec in parameter_table(model.config)
        for tensor in on_disk(spec)
    }
    return write_folder(tmp_path_factory.mktemp("model") / "hf", model.config, tensors, shards=3)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    import_hf(folder, folder.parent / "ours")
    return folder.parent / "ours"


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]


def write_ids(path: Path, documents: Sequence[Sequence[int]]) -> str:
    path.write_text("".join(json.dumps({"input_ids": list(document)}) + "\n" for document in documents))
    return str(path)


def evaluated(capsys: pytest.CaptureFixture[str], data: str, **options: Any) -> dict[str, Any]:
    capsys.readouterr()
    arguments: dict[str, Any] = {"checkpoint": None, "hf": None, "device": "cpu"} | options
    assert evaluate_command(data=data, as_json=True, **arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture(scope="module")
def of_pieces(model: Qwen3NextForCausalLM, documents: list[list[int]]) -> Callable[[int], tuple[float, int]]:
    """:func:`one_by_one` of the documents cut to a length."""

    @cache
    def measure(sequence_length: int) -> tuple[float, int]:
        starts = [(document, start) for document in documents for start in range(0, len(document), sequence_length)]
        return one_by_one(model, [document[start : start + sequence_length + 1] for document, start in starts])

    return measure


def one_by_one(model: Qwen3NextForCausalLM, documents: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Sum of the losses of pieces that are each run alone, from their logits, and the number of targets."""
    total, count = 0.0, 0
    for document in documents:
        if len(document) > 1:
            row = PackedRow(np.array(document), np.array([0, len(document) - 1]), ends_inside_document=True)
            batch = PackedBatch.from_rows([row], mtp_depths=0)
            with torch.no_grad():
                log_probs = model.forward_logits(batch).double().log_softmax(-1)
            total -= float(log_probs.gather(1, batch.labels_T[:, None]).sum())
            count += len(document) - 1
    return total, count


def test_each_document_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Qwen3NextForCausalLM,
    folder: Path,
    checkpoint: Path,
    documents: list[list[int]],
) -> None:
    total, count = one_by_one(model, documents)
    data = write_ids(tmp_path / "ids.jsonl", documents)
    for options in ({"hf": folder}, {"checkpoint": checkpoint}, {"checkpoint": next(checkpoint.glob("*/step_*"))}):
        result = evaluated(capsys, data, **options)
        assert result["num_tokens"] == count == sum(LENGTHS) - len(LENGTHS)
        assert result["loss"] == pytest.approx(total / count, rel=1e-6)
        assert result["bpb"] is None


@pytest.mark.parametrize(
    ("sequence_length", "batch_tokens"),
    # Pieces of one token in batches of one would be as many passes as there are tokens.
    [each for each in product((1, 8, 39, 40, 4096), (1, 50, 1 << 20)) if each != (1, 1)],
)
def test_long_documents_are_cut_and_still_predict_every_token(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    of_pieces: Callable[[int], tuple[float, int]],
    folder: Path,
    documents: list[list[int]],
    sequence_length: int,
    batch_tokens: int,
) -> None:
    monkeypatch.setattr(evaluate_module, "_BATCH_TOKENS", batch_tokens)
    total, count = of_pieces(sequence_length)
    data = write_ids(tmp_path / "ids.jsonl", documents)
    result = evaluated(capsys, data, hf=folder, sequence_length=sequence_length)
    assert result["num_tokens"] == count == sum(LENGTHS) - len(LENGTHS)
    assert result["loss"] == pytest.approx(total / count, rel=1e-6)


def test_documents_of_any_window(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    documents: list[list[int]],
) -> None:
    """Document starts are looked up window by window; windows may end anywhere."""
    data = write_ids(tmp_path / "ids.jsonl", documents)
    expected = evaluated(capsys, data, hf=folder)
    for window in (1, 39, 40, 41):
        monkeypatch.setattr(evaluate_module, "_WINDOW_TOKENS", window)
        assert evaluated(capsys, data, hf=folder) == expected


def test_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Qwen3NextForCausalLM, folder: Path, checkpoint: Path
) -> None:
    text = "def grüße(x):\n    return x + 1\n" * 9
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = next(Tokenizer(BUILTIN).encode_documents([text])).tolist()
    total, count = one_by_one(model, [ids])
    result = evaluated(capsys, str(tmp_path / "text.txt"), hf=folder, tokenizer=BUILTIN)
    assert result["num_tokens"] == count == len(ids) - 1
    assert result["loss"] == pytest.approx(total / count, rel=1e-6)
    # Bits of all tokens, the first one at the mean of the others, over the bytes of the text.
    assert result["bpb"] == pytest.approx(total / count * len(ids) / math.log(2) / len(text.encode()), rel=1e-6)
    assert evaluated(capsys, str(tmp_path / "text.txt"), checkpoint=checkpoint, tokenizer=BUILTIN) == result


def test_the_models_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    own = tmp_path / "hf"
    shutil.copytree(folder, own)
    asset = files("qwen3next_train.data").joinpath("assets", "python-4k", "tokenizer.json")
    (own / "tokenizer.json").write_bytes(asset.read_bytes())
    import_hf(own, tmp_path / "ours")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 5)
    data = str(tmp_path / "text.txt")
    expected = evaluated(capsys, data, hf=folder, tokenizer=BUILTIN)
    assert evaluated(capsys, data, hf=own) == expected
    assert evaluated(capsys, data, checkpoint=tmp_path / "ours") == expected


def test_lines_of_text_are_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Qwen3NextForCausalLM, folder: Path
) -> None:
    texts = ["import os\n", "x = 1\n" * 20, "y"]
    for field in ("text", "body"):
        data = tmp_path / f"{field}.jsonl"
        data.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
        ids = [each.tolist() for each in Tokenizer(BUILTIN).encode_documents(texts)]
        total, count = one_by_one(model, ids)
        result = evaluated(capsys, str(data), hf=folder, tokenizer=BUILTIN, text_field=field)
        assert result["num_tokens"] == count
        assert result["loss"] == pytest.approx(total / count, rel=1e-6)
        num_tokens, num_bytes = sum(map(len, ids)), sum(map(len, texts))
        assert result["bpb"] == pytest.approx(total / count * num_tokens / math.log(2) / num_bytes, rel=1e-6)


def test_a_foreign_token_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, documents: list[list[int]]
) -> None:
    with StoreWriter(tmp_path / "store", np.dtype("<i4")) as writer:
        for document in documents:
            writer.append(np.array(document))
        writer.finish(source="x", tokenizer_fingerprint="", num_bytes=None)
    for ours in ("meta.json", "hashes"):
        (tmp_path / f"store.{ours}").unlink()
    expected = evaluated(capsys, write_ids(tmp_path / "ids.jsonl", documents), hf=folder)
    assert evaluated(capsys, str(tmp_path / "store"), hf=folder) == expected


def test_the_line_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, documents: list[list[int]]
) -> None:
    data = write_ids(tmp_path / "ids.jsonl", documents)
    result = evaluated(capsys, data, hf=folder)
    evaluate_command(checkpoint=None, hf=folder, data=data, as_json=False, device="cpu")
    line = f"{data}: loss {result['loss']:.4f} nats per token, bytes unknown, {result['num_tokens']:,} tokens\n"
    assert capsys.readouterr().out == line
    (tmp_path / "text.txt").write_text("x = 1\n" * 5)
    evaluate_command(
        checkpoint=None, hf=folder, data=str(tmp_path / "text.txt"), as_json=False, device="cpu", tokenizer=BUILTIN
    )
    assert " bits per byte, " in capsys.readouterr().out


def test_how_documents_end_is_said_where_text_is_tokenized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, documents: list[list[int]]
) -> None:
    (tmp_path / "text.txt").write_text("some text " * 50)
    line = f"tokenizer {BUILTIN}: 4,096 ids, documents end with '<|endoftext|>' (0, by the usual name)"
    for data, expected in (
        (str(tmp_path / "text.txt"), [line]),
        (write_ids(tmp_path / "ids.jsonl", documents), []),
    ):
        capsys.readouterr()
        evaluate_command(checkpoint=None, hf=folder, data=data, as_json=True, device="cpu", tokenizer=BUILTIN)
        assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("tied", [False, True])
def test_loading_keeps_fp32_parameters_and_ties(tmp_path: Path, tied: bool) -> None:
    config = tiny_model(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    weights = weights_of_hf(write_folder(tmp_path / "hf", config, tensors))
    loaded = load_model(weights, device=CPU, dtype=torch.bfloat16, command="eval")
    assert loaded.mtp is None
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for spec in parameter_table(loaded.config):
        parameter = loaded.get_parameter(spec.name)
        assert parameter.dtype == (torch.float32 if spec.fp32 else torch.bfloat16), spec.name
    assert torch.equal(loaded.model.norm.weight, tensors["model.norm.weight"].bfloat16())
    assert not list(loaded.buffers())


def test_loading_in_pieces(monkeypatch: pytest.MonkeyPatch, model: Qwen3NextForCausalLM, checkpoint: Path) -> None:
    monkeypatch.setattr(finished_model, "_COPIED_ELEMENTS", 7)
    loaded = load_model(weights_of_checkpoint(checkpoint), device=CPU, dtype=torch.float32, command="eval")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_progress_of_long_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    documents: list[list[int]],
) -> None:
    logger = logging.getLogger("qwen3next_train")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(finished_model, "_PROGRESS_INTERVAL_S", 0.0)
    monkeypatch.setattr(evaluate_module, "_BATCH_TOKENS", 1)
    caplog.set_level(logging.INFO, logger=logger.name)
    data = write_ids(tmp_path / "ids.jsonl", documents)
    loss = evaluated(capsys, data, hf=folder, sequence_length=100)["loss"]
    assert f"eval: {data}, tokens: 209 of 215, loss {loss:.4f}" in caplog.messages
    assert any(message.startswith("eval: loading weights, parameters: ") for message in caplog.messages)


class TestFaults:
    @pytest.mark.parametrize("both", [False, True])
    def test_one_model(self, folder: Path, checkpoint: Path, both: bool) -> None:
        given = (checkpoint, folder) if both else (None, None)
        with pytest.raises(ConfigError, match="give either --checkpoint or --hf"):
            evaluate_command(checkpoint=given[0], hf=given[1], data="x", as_json=True)

    def test_text_without_a_tokenizer(self, tmp_path: Path, folder: Path, checkpoint: Path) -> None:
        (tmp_path / "text.txt").write_text("x = 1\n")
        for options in ({"hf": folder, "checkpoint": None}, {"hf": None, "checkpoint": checkpoint}):
            with pytest.raises(ConfigError, match="the model came without a tokenizer; name one"):
                evaluate_command(**options, data=str(tmp_path / "text.txt"), as_json=True, device="cpu")

    @pytest.mark.parametrize(
        ("lines", "text"),
        [
            ('{"input_ids": [1, 4096]}\n', r"ids\.jsonl:1: input_ids: 4096 is not below the model's vocab_size 4096"),
            ('{"input_ids": [1, 70000]}\n', r"70000 is not below"),
            ('{"input_ids": [1, 2]}\n{"text": "x"}\n', r"ids\.jsonl:2: text, after lines of input_ids"),
            ('{"input_ids": [1, 2]}\n{"input_ids": ["a"]}\n', r"ids\.jsonl:2: input_ids: expected a list of integers"),
            ('{"input_ids": [1]}\n{"input_ids": [2]}\n', "no document has two tokens"),
            ("", r"ids\.jsonl: no documents"),
            ("\n\n", r"ids\.jsonl: no documents"),
        ],
    )
    def test_data(self, tmp_path: Path, folder: Path, lines: str, text: str) -> None:
        (tmp_path / "ids.jsonl").write_text(lines)
        with pytest.raises((DataError, ConfigError), match=text):
            evaluate_command(checkpoint=None, hf=folder, data=str(tmp_path / "ids.jsonl"), as_json=True, device="cpu")

    def test_no_data(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(DataError, match="no such file, folder or token store"):
            evaluate_command(checkpoint=None, hf=folder, data=str(tmp_path / "x.txt"), as_json=True, device="cpu")

    def test_a_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        config = tiny_model()
        source = write_folder(tmp_path / "hf", config, random_tensors(config))
        (tmp_path / "text.txt").write_text("x = 1\n")
        with pytest.raises(ConfigError, match="13 is smaller than the tokenizer's"):
            evaluate_command(
                checkpoint=None,
                hf=source,
                data=str(tmp_path / "text.txt"),
                as_json=True,
                device="cpu",
                tokenizer=BUILTIN,
            )

    def test_weights_that_overflow(self, tmp_path: Path) -> None:
        config = tiny_model()
        tensors = random_tensors(config)
        tensors["lm_head.weight"].fill_(float("inf"))
        source = write_folder(tmp_path / "hf", config, tensors)
        data = write_ids(tmp_path / "ids.jsonl", [[1, 2, 3]])
        with pytest.raises(DivergedError, match=r"the loss on .* is nan"):
            evaluate_command(checkpoint=None, hf=source, data=data, as_json=True, device="cpu")

    def test_a_sequence_of_nothing(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="0 tokens a sequence"):
            evaluate_command(checkpoint=None, hf=folder, data="x", as_json=True, sequence_length=0)

    def test_temporary_files_go(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        evaluated(capsys, write_ids(tmp_path / "ids.jsonl", [[1, 2, 3]]), hf=folder)
        assert list(temporary.iterdir()) == []
