from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data import prepare
from qwen3next_train.data.documents import Document
from qwen3next_train.data.left_out import LeftOut
from qwen3next_train.data.prepare import prepare_evaluation, prepare_stores
from qwen3next_train.data.prepared import PreparedData
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.data.tokenize_command import tokenize
from qwen3next_train.data.validation import ValidationData
from qwen3next_train.errors import ConfigError, DataError, StorageError
from tests.unit.data.corpus import config_of, make_config, write_store


def test_split_by_content_with_exact_counts(tmp_path: Path, corpus: Path) -> None:
    prepared = prepare_stores(config_of(tmp_path, corpus, validation_fraction=0.1))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    held_out = [text for text in texts if Document("", "", "", None, text.encode()).is_held_out(0.1)]
    (train,), (validation,) = prepared.train, prepared.validation
    assert len(validation.documents.documents) == len(held_out) > 20
    assert len(train.documents.documents) == 400 - len(held_out)
    assert validation.num_bytes == sum(len(text.encode()) for text in held_out)
    expected = [ids for document in Tokenizer(BUILTIN).encode_documents(held_out) for ids in document.tolist()]
    assert validation.documents.read(0, validation.documents.num_tokens).tolist() == expected
    assert prepared.eos_token_id == 0


def test_second_time_is_cached_and_content_decides(tmp_path: Path, corpus: Path) -> None:
    first = prepare_stores(config_of(tmp_path, corpus))
    again = prepare_stores(config_of(tmp_path, corpus))
    assert first.train[0].build_s is not None
    assert again.train[0].build_s is None
    assert again.fingerprint == first.fingerprint
    corpus.rename(corpus.with_name("moved.jsonl"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "moved.jsonl").rename(tmp_path / "sub" / "corpus.jsonl")
    moved = prepare_stores(config_of(tmp_path, tmp_path / "sub" / "corpus.jsonl"))
    assert (moved.train[0].build_s, moved.fingerprint) == (None, first.fingerprint)
    with (tmp_path / "sub" / "corpus.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    changed = prepare_stores(config_of(tmp_path, tmp_path / "sub" / "corpus.jsonl"))
    assert changed.fingerprint != first.fingerprint


def test_fingerprint_sees_weights_split_and_order(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "b.txt").write_text("some text " * 50)
    a, b = {"source": str(corpus)}, {"source": str(tmp_path / "b.txt")}
    cache = tmp_path / "cache"
    variants = [
        make_config(cache, [a, b]),
        make_config(cache, [b, a]),
        make_config(cache, [a, {**b, "weight": 2.0}]),
        make_config(cache, [a, b], validation_fraction=0.5),
        make_config(cache, [a]),
    ]
    assert len({prepare_stores(config).fingerprint for config in variants}) == 5


def test_own_validation_sources_leave_the_training_text_whole(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "val.txt").write_text("held out " * 30)
    validation = [{"source": str(tmp_path / "val.txt")}]
    prepared = prepare_stores(config_of(tmp_path, corpus, validation_sources=validation, validation_fraction=0.5))
    assert len(prepared.train[0].documents.documents) == 400
    assert [source.num_bytes for source in prepared.validation] == [270]


def test_single_record_is_for_training_whatever_its_hash(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} text " * 50}))
        prepared = prepare_stores(config_of(tmp_path, tmp_path / f"{name}.jsonl", validation_fraction=0.9))
        assert len(prepared.train[0].documents.documents) == 1
        assert prepared.validation == ()


@pytest.mark.parametrize("name", ["book", "book.txt", "only/book.txt.gz"])
def test_of_a_single_text_file_the_end_is_held_out(tmp_path: Path, name: str) -> None:
    lines = [f"line {number} of the only text, ünicode\n" for number in range(2000)]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    raw = "".join(lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    source = path if path.parent == tmp_path else path.parent
    prepared = prepare_stores(config_of(tmp_path, source, validation_fraction=0.1))
    sizes = [each.num_bytes for each in (*prepared.train, *prepared.validation)]
    cut = next(at for at in range(2000) if sum(len(line.encode()) for line in lines[:at]) == sizes[0])
    assert cut == 1803, "the first numbers are shorter"
    assert sizes[1] == len(raw) - sizes[0]
    expected = Tokenizer(BUILTIN).encode_documents(["".join(lines[:cut]), "".join(lines[cut:])])
    assert tokens_of(prepared) == [ids.tolist() for ids in expected]
    assert ValidationData(prepared, config_of(tmp_path, source), num_rows=None).num_rows > 50
    whole = prepare_stores(config_of(tmp_path, source, validation_fraction=0.0))
    assert (whole.train[0].num_bytes, whole.validation) == (len(raw), ())
    own = [{"source": str(source)}]
    named = prepare_stores(config_of(tmp_path, source, validation_sources=own, validation_fraction=0.1))
    assert [each.num_bytes for each in (*named.train, *named.validation)] == [len(raw)] * 2


def test_token_store_holds_out_its_last_documents(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [[n] * 3 for n in range(1, 101)])
    prepared = prepare_stores(config_of(tmp_path, tmp_path / "store", validation_fraction=0.05))
    (train,), (validation,) = prepared.train, prepared.validation
    assert (train.documents.documents, validation.documents.documents) == (range(95), range(95, 100))
    assert validation.documents.read(0, 4).tolist() == [96, 96, 96, 97]
    assert prepared.eos_token_id is None
    assert not (tmp_path / "cache").exists()
    whole = prepare_stores(config_of(tmp_path, tmp_path / "store", validation_fraction=0.001))
    assert whole.validation == ()
    assert whole.fingerprint != prepared.fingerprint


def test_stores_of_different_tokenizers_do_not_mix(tmp_path: Path, corpus: Path) -> None:
    write_store(tmp_path / "store", [[1] * 50])
    with pytest.raises(ConfigError, match="tokenised with different tokenizers"):
        prepare_stores(config_of(tmp_path, corpus, tmp_path / "store"))


def test_evaluation_takes_everything(tmp_path: Path, corpus: Path) -> None:
    prepared = prepare_evaluation(config_of(tmp_path, corpus), SourceConfig(source=str(corpus)))
    assert prepared.train == ()
    assert len(prepared.validation[0].documents.documents) == 400


def test_ready_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [5, 6, 7]}\n{"text": "abc"}\n{"input_ids": [8]}\n')
    prepared = prepare_evaluation(config_of(tmp_path, path), SourceConfig(source=str(path)))
    (source,) = prepared.validation
    tokens = source.documents.read(0, source.documents.num_tokens).tolist()
    assert (tokens[:3], tokens[-2:], source.num_bytes) == ([5, 6, 7], [0, 8], None)
    path.write_text('{"input_ids": [5, 4096]}\n')
    with pytest.raises(DataError, match=r"ids\.jsonl:1: input_ids: 4096 is not an id of the tokenizer, which has 4096"):
        prepare_evaluation(config_of(tmp_path, path), SourceConfig(source=str(path)))


def test_what_is_not_read_is_said_at_every_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.ndjson").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    (folder / "b.pdf").write_bytes(b"%PDF" * 300)
    for _ in range(2):
        (source,) = prepare_stores(config_of(tmp_path, folder, validation_fraction=0.0)).train
        assert len(source.documents.documents) == 2
        assert source.left_out == {"null": LeftOut(1, "a.ndjson:2"), "empty": LeftOut(1, "a.ndjson:3")}
        assert [(group.reason, group.num_files, group.num_bytes) for group in source.passed_over] == [(".pdf", 1, 1200)]
        said = capsys.readouterr().err
        assert f"{folder}: 1 files read, passed over 1 .pdf (1.2 kB, such as b.pdf)" in said
        assert f"{folder}: left out 1 empty (such as a.ndjson:3), 1 null (such as a.ndjson:2)" in said


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: no documents"):
        prepare_stores(config_of(tmp_path, tmp_path / "empty.jsonl"))


def test_broken_line_leaves_nothing_in_the_cache(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:401: not a JSON object"):
        prepare_stores(config_of(tmp_path, corpus))
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] in ([], [tmp_path / "cache" / "digests"])


def test_unwritable_cache(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cache"):
        prepare_stores(config_of(tmp_path, corpus))


def test_vocabulary_larger_than_the_model(tmp_path: Path, corpus: Path) -> None:
    config = config_of(tmp_path, corpus)
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 100})})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 100"):
        prepare_stores(small)


def test_default_cache_is_the_users(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config = config_of(tmp_path, corpus)
    prepared = prepare_stores(config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": ""})}))
    assert prepared.train[0].documents.store.prefix.is_relative_to(tmp_path / "xdg" / "qwen3next_train")


def tokens_of(prepared: PreparedData) -> list[list[int]]:
    return [
        each.documents.read(0, each.documents.num_tokens).tolist() for each in (*prepared.train, *prepared.validation)
    ]


@pytest.mark.parametrize("content", ["", "{", "[" * 50_000, '{"empty": 3}', None])
def test_damaged_count_of_what_was_left_out_is_made_again(tmp_path: Path, corpus: Path, content: str | None) -> None:
    with corpus.open("a") as file:
        file.write('{"text": ""}\n')
    config = config_of(tmp_path, corpus)
    first = prepare_stores(config)
    (path,) = (tmp_path / "cache").glob("*/left_out.json")
    if content is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(content)
    again = prepare_stores(config)
    assert again.train[0].build_s is not None
    assert [each.train[0].left_out for each in (first, again)] == [{"empty": LeftOut(1, "corpus.jsonl:401")}] * 2
    assert tokens_of(again) == tokens_of(first)


@pytest.mark.parametrize("checked_at_start", [0, 1 << 30])
def test_flipped_bits_in_the_users_store_end_the_run_with_file_and_offset(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, checked_at_start: int
) -> None:
    monkeypatch.setattr(prepare, "CHECKED_AT_START_BYTES", checked_at_start)
    tokenize(config_of(tmp_path, corpus), tmp_path / "store")
    path = tmp_path / "store.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"store\.bin: bytes 0 to \d+: expected xxh3 .* restore the store"):
        tokens_of(prepare_stores(config_of(tmp_path, tmp_path / "store")))
    assert path.read_bytes() == raw


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_source_that_cannot_be_looked_up_now(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(StorageError, match=r"corpus\.jsonl: cannot be read .*may be intact"):
        prepare_stores(config_of(tmp_path, corpus))


@pytest.mark.parametrize("prepare", [prepare_stores, lambda config: tokenize(config, None)])
def test_no_source_asks_for_the_users_data(prepare: Callable[[Config], object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: no source .*name your text and its tokenizer"):
        prepare(make_config(tmp_path, []))


@pytest.mark.parametrize("key", ["validation_sources", "validation_sets"])
def test_a_missing_source_is_said_before_any_is_tokenised(tmp_path: Path, corpus: Path, key: str) -> None:
    missing = [SourceConfig(source=str(tmp_path / "missing.txt"))]
    config = config_of(tmp_path, corpus)
    data = config.data.model_copy(update={key: {"a": missing} if key == "validation_sets" else missing})
    with pytest.raises(DataError) as caught:
        prepare_stores(config.model_copy(update={"data": data}))
    assert str(caught.value) == f"{tmp_path}/missing.txt: no such file, folder or token store; check the source's name"
    assert not (tmp_path / "cache").exists()
