from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from qwen3next_train.data import tokenization
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer, split_text
from qwen3next_train.errors import ConfigError, StorageError


@pytest.fixture(scope="module")
def builtin() -> Tokenizer:
    return Tokenizer(BUILTIN)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return next(tokenizer.encode_documents([text])).tolist()


def test_builtin_has_4096_tokens_and_loses_nothing(builtin: Tokenizer) -> None:
    assert builtin.num_ids == 4096
    assert (builtin.eos_token, builtin.eos_token_id) == ("<|endoftext|>", 0)
    text = "def f(x):\n    return x ** 2  # ü 中文 😀 \x00\r\n\t" + "".join(map(chr, range(1, 0x250)))
    ids = encode(builtin, text)
    raw = RawTokenizer.from_file(str(Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json"))
    assert raw.decode(ids[:-1], skip_special_tokens=False) == text
    assert ids[-1] == 0
    assert 0 not in ids[:-1]


def test_builtin_ids_never_change(builtin: Tokenizer) -> None:
    assert encode(builtin, "import os\n\ndef main():\n    pass\n") == [620, 558, 328, 541, 2430, 735, 259, 637, 199, 0]


def test_special_tokens_in_text_are_text(builtin: Tokenizer) -> None:
    ids = encode(builtin, "a<|endoftext|>b")
    assert ids.count(0) == 1
    assert len(ids) > 5


def test_documents_come_back_in_order_each_with_its_end(builtin: Tokenizer) -> None:
    found = [ids.tolist() for ids in builtin.encode_documents(["x", "", "y"])]
    assert found == [[*encode(builtin, "x")[:-1], 0], [0], [*encode(builtin, "y")[:-1], 0]]


def test_pieces_of_a_long_text_are_encoded_like_the_whole(builtin: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(tokenization.__file__)).read_text() * 4
    whole = encode(builtin, text)
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 1000)
    monkeypatch.setattr(tokenization, "GROUP_CHARS", 3500)
    assert encode(builtin, text) == whole


CODE = Path(tokenization.__file__).read_text()

NORMALIZERS = {
    "llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "strip": normalizers.Sequence([normalizers.Strip(), normalizers.NFD(), normalizers.StripAccents()]),
    "metaspace": None,
    "byte-level with a space before": normalizers.NFC(),
}
PRE_TOKENIZERS = {
    "metaspace": pre_tokenizers.Metaspace(),
    "byte-level with a space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
}
LONG_TEXTS = {
    "code": CODE[:6000],
    "one long word": "ab" * 1500,
    "spaces": " " * 3000,
    "digits": "".join(str(n * n) for n in range(700)),
    "combining": "e\u0301\u0323 \ufb01 中😀" * 300,
    "paragraphs": "word\n\n   word </s> " * 200,
}


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_cutting_never_changes_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = RawTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if NORMALIZERS[kind] is not None:
        raw.normalizer = NORMALIZERS[kind]
    if kind in PRE_TOKENIZERS:
        raw.pre_tokenizer = PRE_TOKENIZERS[kind]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"], show_progress=False)
    raw.train_from_iterator(CODE.splitlines(), trainer)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    texts = ["short", *LONG_TEXTS.values(), ""]
    whole = [ids.tolist() for ids in tokenizer.encode_documents(texts)]
    monkeypatch.setattr(tokenization, "PIECE_CHARS", 400)
    monkeypatch.setattr(tokenization, "GROUP_CHARS", 900)
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == whole


@pytest.mark.parametrize("text", ["", "abc", "x" * 1000, "word " * 300, "line\n" * 300, "\n" * 500, "  a\n" * 200])
def test_split_text_concatenates_to_the_text(text: str) -> None:
    pieces = list(split_text(text, 64))
    assert "".join(pieces) == text
    assert all(len(piece) <= 64 for piece in pieces)
    assert len(pieces) <= max(1, -(-len(text) // 32))


def write(path: Path) -> Path:
    """The packaged tokenizer, formatted differently."""
    content = json.loads((Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json").read_text())
    path.write_text(json.dumps(content))
    return path


def test_truncation_padding_and_templates_of_the_file_are_ignored(builtin: Tokenizer, tmp_path: Path) -> None:
    raw = RawTokenizer.from_file(str(write(tmp_path / "tokenizer.json")))
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    raw.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven"
    assert encode(Tokenizer(str(tmp_path)), text) == encode(builtin, text)


def test_end_of_document_token_of_other_tokenizers(tmp_path: Path) -> None:
    def save(*tokens: str) -> str:
        raw = RawTokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
        raw.save(str(tmp_path / "tokenizer.json"))
        return str(tmp_path / "tokenizer.json")

    assert Tokenizer(save("a", "<|im_end|>", "<|endoftext|>")).eos_token_id == 2
    assert Tokenizer(save("a", "<|im_end|>")).eos_token_id == 1
    with pytest.raises(ConfigError, match=r"no end-of-document token, looked for <\|endoftext\|>, <\|im_end\|>"):
        Tokenizer(save("a", "b"))


def test_the_end_of_document_token_is_said_and_part_of_the_fingerprint(builtin: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes((Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json").read_bytes())
    ends = "documents end with '<|endoftext|>' (0, by the usual name)"
    assert builtin.describe(4096) == f"tokenizer {BUILTIN}: 4,096 ids, {ends}"
    asked = Tokenizer(str(path), "def")
    assert asked.eos_token_id == asked._tokenizer.token_to_id("def") != 0
    assert encode(asked, "x")[-1] == asked.eos_token_id
    assert asked.fingerprint != builtin.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "def"}')
    assert Tokenizer(str(tmp_path)).fingerprint == asked.fingerprint
    assert Tokenizer(str(tmp_path), "<|endoftext|>").fingerprint == builtin.fingerprint
    # Settings beside a file of another name may be another tokenizer's.
    other = path.rename(tmp_path / "mine.json")
    assert Tokenizer(str(other)).eos_token == "<|endoftext|>"


def test_a_tokenizer_smaller_than_the_model_is_said(builtin: Tokenizer) -> None:
    assert builtin.describe(151936).endswith("; 147,840 of the 151,936 rows of model.vocab_size belong to no id of it")


def test_vocabulary_must_fit_the_model(builtin: Tokenizer) -> None:
    builtin.require_vocab_size(4096)
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 4095 is smaller than the tokenizer's 4096 ids"):
        builtin.require_vocab_size(4095)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_broken_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*tokenizer\.json") as caught:
        Tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no builtin tokenizer 'builtin:gpt2'"):
        Tokenizer("builtin:gpt2")
    # The home folder has taken the place of ~ when the configuration was loaded.
    with pytest.raises(ConfigError, match=r"data\.tokenizer: ~nobody: cannot be read \(No such file or directory\)"):
        Tokenizer("./~nobody")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_unreadable_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asset = Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(asset.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for code, reason in ((errno.EIO, "Input/output error"), (errno.EMFILE, "Too many open files: raise the limit, ")):
        real = os.open

        def refuse(path: str | Path, *arguments: int, code: int = code, real: Callable[..., int] = real) -> int:
            if Path(path).name == name:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(StorageError) as caught:
                Tokenizer(str(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read ({reason}")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_file_is_waited_for(tmp_path: Path, name: str) -> None:
    asset = Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(asset.read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        ConfigError, match=rf"data\.tokenizer: .*{name}: cannot be read \(not a regular file\); put the file there, or "
    ):
        Tokenizer(str(tmp_path))


def test_fingerprint_depends_on_content_only(builtin: Tokenizer, tmp_path: Path) -> None:
    asset = Path(tokenization.__file__).parent / "assets/python-4k/tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(asset.read_bytes())
    assert Tokenizer(str(tmp_path)).fingerprint == builtin.fingerprint
    assert Tokenizer(str(write(tmp_path / "tokenizer.json"))).fingerprint != builtin.fingerprint
