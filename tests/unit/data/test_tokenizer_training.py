"""Training a tokenizer: on which text, to which tokens, and that nothing else decides them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.progress import Progress
from qwen3next_train.data.tokenizer_training import (
    QWEN_SPLIT,
    SPECIAL_TOKENS,
    require_trainable,
    text_sources,
    train_bpe,
    train_on_sources,
)
from qwen3next_train.errors import ConfigError, DataError
from tests.unit.data.corpus import write_store

TEXTS = [
    "the cat and the hat, the cat's hat: 1234\n" * 3,
    "def the_cat():\n    return 'Größe'\n" * 2,
    "   \t\n日本語 日本語",
]


def source(path: Path | str, **settings: str) -> SourceConfig:
    return SourceConfig(source=str(path), **settings)


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    return train_bpe(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, split=QWEN_SPLIT)


def test_ids_are_special_tokens_then_bytes_then_merges_by_frequency() -> None:
    tokenizer = train(["ab ab ab abc abc"], 262)
    assert [tokenizer.id_to_token(index) for index in range(3)] == list(SPECIAL_TOKENS)
    assert len({tokenizer.id_to_token(index) for index in range(3, 259)}) == 256
    # "ab" occurs five times, " ab" (written with Ġ) four times, "abc" twice, behind a space both times.
    assert [tokenizer.id_to_token(index) for index in range(259, 262)] == ["ab", "Ġab", "Ġabc"]
    # What occurs once is no token.
    assert train(["ab ab ab abc"], 300).get_vocab_size() == 261


def test_split_is_qwens() -> None:
    """Contractions, words with the space before them, single digits, runs of punctuation and of line breaks."""
    pieces = train(TEXTS, 259).pre_tokenizer.pre_tokenize_str("I'll pay $1234 for it...\n\n  OK")
    words = ["I", "'ll", " pay", " $", "1", "2", "3", "4", " for", " it", "...\n\n", " ", " OK"]
    assert [word for word, _ in pieces] == [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in words]


@pytest.mark.parametrize("text", [*TEXTS, "e\u0301 is not \u00e9", "\0\x7f\u200b\U0001f600 \r\n"])
def test_every_text_comes_back(text: str) -> None:
    tokenizer = train(TEXTS, 280)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_sources_are_read_as_a_run_reads_them_and_the_result_is_a_function_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "plain" / f"{index}.txt").write_text(text)
    (tmp_path / "plain" / "picture.png").write_bytes(b"\x89PNG")
    lines = "".join(json.dumps({"content": text}) + "\n" for text in TEXTS)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain = train_on_sources(text_sources([source(tmp_path / "plain")]), 270)
    records = train_on_sources(text_sources([source(tmp_path / "lines.jsonl.gz", text_field="content")]), 270)
    assert (plain.num_tokens, plain.num_documents) == (270, 3)
    assert plain.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert records == plain
    twice = train_on_sources(text_sources([source(tmp_path / "plain"), source(tmp_path / "plain")]), 270)
    assert (twice.num_documents, twice.num_bytes) == (6, 2 * plain.num_bytes)


def test_progress_counts_documents_and_stored_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[tuple[int, ...]] = []
    monkeypatch.setattr(Progress, "update", lambda self, *totals: updates.append(totals))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("ab ab ab")
    (files,) = text_sources([source(tmp_path)])
    train_on_sources([files], 260)
    assert updates == [(1, 8, 8), (2, 16, 16)]
    assert sum(1 for _ in read_documents(files, {})) == 2
    assert Progress("x", 100, unit="documents").state(7, 50, 50, 0.0) == "50 %, 7 documents"


def test_more_tokens_than_the_text_gives(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    message = r"8 bytes of text give no more than 261 tokens \(got 4,000\); ask for at most so many"
    with pytest.raises(ConfigError, match=message):
        train_on_sources(text_sources([source(tmp_path)]), 4000)


def test_what_is_no_text_is_rejected(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[1, 2, 3]])
    with pytest.raises(ConfigError, match="store is a token store; a tokenizer is trained on text"):
        text_sources([source(tmp_path / "store")])
    with pytest.raises(ConfigError, match=r"no source \(got \[\]\)"):
        text_sources([])
    ids, empty = tmp_path / "ids.jsonl", tmp_path / "empty.txt"
    ids.write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(DataError, match=r"ids\.jsonl:1: token ids, no text"):
        train_on_sources(text_sources([source(ids)]), 300)
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.txt: no documents \(1 empty \(such as empty\.txt\)\)"):
        train_on_sources(text_sources([source(empty)]), 300)


@pytest.mark.parametrize("vocab_size", [1, 259])
def test_vocabulary_without_room_for_a_merge(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"{vocab_size} is too small for a tokenizer; give at least 260"):
        require_trainable(vocab_size)
    require_trainable(260)
