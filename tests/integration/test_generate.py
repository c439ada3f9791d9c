"""The ``generate`` subcommand on small random weights, with transformers nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.checkpoint import discovery
from qwen3next_train.checkpoint.weights import weights_of_checkpoint
from qwen3next_train.cli.main import main
from qwen3next_train.data.tokenization import BUILTIN
from qwen3next_train.errors import ExitCode
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.huggingface.weights import weights_of_hf
from tests.unit.huggingface.support import random_tensors, tiny_model, write_folder

MODEL = tiny_model(vocab_size=4096, max_position_embeddings=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "hf", MODEL, random_tensors(MODEL), shards=2)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    import_hf(folder, folder.parent / "ours")
    return folder.parent / "ours"


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[str]:
    """Lines of standard output, or of standard error where it fails."""
    capsys.readouterr()
    found = main(["generate", "--device", "cpu", *map(str, words)])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return (captured.err if code else captured.out).splitlines()


def rows(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, "--json", *words)]


def test_text_and_json(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("--hf", folder, "--tokenizer", BUILTIN, "--max-new-tokens", 5)
    (row,) = rows(capsys, *words, "--prompt", "def f(x):")
    assert list(row) == ["prompt", "text", "token_ids", "finish_reason"]
    assert (row["prompt"], len(row["token_ids"]), row["finish_reason"]) == ("def f(x):", 5, "length")
    assert run(capsys, *words, "--prompt", "def f(x):") == ("def f(x):" + row["text"]).splitlines()


def test_without_a_tokenizer_ids_are_read_and_printed(
    capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path
) -> None:
    words = ("--precision", "fp32", "--max-new-tokens", 3, "--prompt", "5, 6")
    from_folder = run(capsys, "--hf", folder, *words)
    assert from_folder == run(capsys, "--checkpoint", checkpoint, *words)
    (line,) = from_folder
    assert line.startswith("5, 6 ")
    assert len(line.split()) == 5
    assert len(rows(capsys, "--hf", folder, *words)[0]["token_ids"]) == 3


@pytest.mark.parametrize("as_rows", [False, True])
def test_a_file_of_prompts_is_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, as_rows: bool
) -> None:
    prompts = ["x", "a\x0cb\u2028c", "def function(argument, other):"]
    path = tmp_path / ("prompts.jsonl" if as_rows else "prompts.txt")
    lines = [json.dumps({"prompt": prompt, "more": 1}) for prompt in prompts] if as_rows else prompts
    # As Windows' editors write it: the mark in front belongs to no prompt.
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode("utf-8-sig"))
    words = ("--hf", folder, "--tokenizer", BUILTIN, "--max-new-tokens", 4, "--precision", "fp32")
    together = rows(capsys, *words, "--prompts", path)
    assert [row["prompt"] for row in together] == prompts
    assert together == [row for prompt in prompts for row in rows(capsys, *words, f"--prompt={prompt}")]


def test_what_is_drawn_follows_from_the_seed(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("--hf", folder, "--prompt", "1 2 3", "--top-p", 0.9, "--max-new-tokens", 8)
    first = rows(capsys, *words, "--seed", 1)
    assert first == rows(capsys, *words, "--run.seed", 1)
    assert first != rows(capsys, *words, "--seed", 2)


def test_precision_is_that_of_training_or_of_the_folder(tmp_path: Path, checkpoint: Path) -> None:
    assert weights_of_checkpoint(checkpoint).precision == "bf16"
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "fp32"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float32"}, "fp32"),
    ]
    for number, (fields, expected) in enumerate(cases):
        changed = write_folder(tmp_path / str(number), MODEL, random_tensors(MODEL), **fields)
        assert weights_of_hf(changed).precision == expected


class TestFaults:
    @pytest.mark.parametrize(
        ("words", "code", "line"),
        [
            (["--prompt", ""], 2, "--prompt: empty; give text to go on from"),
            (["--prompt=1", "--prompt= "], 2, "--prompt 2: empty; give text to go on from"),
            (
                ["--prompt", " ".join(["7"] * 252), "--max-new-tokens=5"],
                2,
                "--prompt: 252 tokens and 5 new ones are more than max_position_embeddings 256; "
                "give --max-new-tokens 4 or fewer, or a shorter prompt",
            ),
            (
                ["--prompt", " ".join(["7"] * 256), "--max-new-tokens=1"],
                2,
                "--prompt: 256 tokens and 1 new ones are more than max_position_embeddings 256; give a shorter prompt",
            ),
            (
                ["--prompt", "1 4096"],
                2,
                "--prompt: token 4096 is not below the model's vocab_size 4096; give smaller ids",
            ),
        ],
    )
    def test_prompts(
        self, capsys: pytest.CaptureFixture[str], folder: Path, words: Sequence[str], code: int, line: str
    ) -> None:
        assert run(capsys, "--hf", folder, *words, code=code) == [line]

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("p.txt", b"", "--prompts: PATH: empty; give a prompt a line"),
            ("p.txt", b"1\n\n2\n", "PATH:2: empty; give text to go on from"),
            ("p.txt", b"\xff\n", "--prompts: PATH: no UTF-8 text; name a file with a prompt a line"),
            *(
                (
                    "p.jsonl",
                    line,
                    'PATH:1: not an object with a text under "prompt"; write {"prompt": "..."} on each line',
                )
                for line in (b"x\n", b'{"prompt": 1}\n', b'["prompt"]\n', b'{"text": "x"}\n', b"[" * 5000 + b"\n")
            ),
            ("p.txt", None, "--prompts: PATH: cannot be read (No such file or directory); put the file there; name"),
        ],
    )
    def test_files(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        folder: Path,
        name: str,
        content: bytes | None,
        text: str,
    ) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        (line,) = run(capsys, "--hf", folder, "--prompts", path, code=2)
        assert line.startswith(text.replace("PATH", str(path)))

    def test_no_such_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (line,) = run(capsys, "--checkpoint", tmp_path / "x", "--prompt=1", code=2)
        assert line == f"{tmp_path / 'x'}: no such directory; name a run directory or one of its checkpoints"

    def test_a_damaged_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        import_hf(folder, tmp_path / "ours")
        for path in (tmp_path / "ours").rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        *_, line = run(capsys, "--checkpoint", tmp_path / "ours", "--prompt=1", code=ExitCode.DATA)
        assert "safetensors" in line

    def test_a_bad_prompt_is_refused_before_a_byte_of_the_weights_is_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import_hf(folder, tmp_path / "ours")
        monkeypatch.setattr(discovery, "hash_file", lambda *arguments: pytest.fail("a file of weights was read"))
        (tmp_path / "empty").touch()
        for words, line in (
            (["--prompt", "1 " * 253], "--prompt: 253 tokens and 4 new ones are more than max_position_embeddings 256"),
            (["--prompt", "4096"], "--prompt: token 4096 is not below the model's vocab_size 4096"),
            (["--prompt=1", "--prompt=x"], "--prompt 2: the model came without a tokenizer"),
            (["--prompt", "def", "--tokenizer", "none"], "data.tokenizer: "),
            (["--prompts", tmp_path / "empty"], f"--prompts: {tmp_path}/empty: empty"),
            (["--prompts", tmp_path / "none"], f"--prompts: {tmp_path}/none: cannot be read (No such file"),
        ):
            (found,) = run(capsys, "--checkpoint", tmp_path / "ours", "--max-new-tokens=4", *words, code=2)
            assert found.startswith(line)

    def test_prompts_are_of_the_checkpoint_that_is_intact(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        import_hf(folder, tmp_path / "ours")
        checkpoints = tmp_path / "ours" / "checkpoints"
        shutil.copytree(checkpoints / "step_00000000", checkpoints / "step_00000001")
        (checkpoints / "step_00000001" / "MANIFEST.json").write_text("{}")
        found = run(capsys, "--checkpoint", tmp_path / "ours", "--prompt=1 2")
        assert found == run(capsys, "--checkpoint", checkpoints / "step_00000000", "--prompt=1 2")

    def test_a_damaged_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        broken = write_folder(tmp_path / "hf", MODEL, random_tensors(MODEL))
        (broken / "config.json").write_text("{")
        (line,) = run(capsys, "--hf", broken, "--prompt=1", code=ExitCode.DATA)
        assert "config.json" in line

    def test_a_tokenizer_of_a_larger_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = tiny_model()
        small = write_folder(tmp_path / "hf", model, random_tensors(model))
        (line,) = run(capsys, "--hf", small, "--tokenizer", BUILTIN, "--prompt", "def f", code=2)
        assert line.endswith("is not below the model's vocab_size 13; name the tokenizer that the model was made with")

    def test_weights_that_overflow(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tensors = random_tensors(MODEL)
        tensors["lm_head.weight"].fill_(float("inf"))
        broken = write_folder(tmp_path / "hf", MODEL, tensors)
        (line,) = run(capsys, "--hf", broken, "--prompt=1", code=ExitCode.DIVERGED)
        assert line == (
            "generate: --prompt: the logits after 0 new tokens are not finite; the weights of "
            f"{broken} are damaged or overflow in bf16"
        )
