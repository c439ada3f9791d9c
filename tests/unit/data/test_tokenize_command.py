from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3next_train.data import prepare, tokenize_command
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.data.tokenize_command import tokenize
from qwen3next_train.errors import ConfigError, DataError, StoppedBySignal, StorageError
from tests.unit.data.corpus import config_of


def test_tokenize_fills_the_cache(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize(config_of(tmp_path, corpus, validation_fraction=0.1), None) == 0
    train, validation = capsys.readouterr().out.splitlines()
    assert "train: " in train
    assert "tokens/s" in train
    assert "validation: " in validation
    assert "bytes/token" in validation
    tokenize(config_of(tmp_path, corpus, validation_fraction=0.1), None)
    assert capsys.readouterr().out.count("cached") == 2


def test_tokenize_writes_a_store_that_trains(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "corpus"
    assert tokenize(config_of(tmp_path, corpus), output) == 0
    assert f"-> {output}" in capsys.readouterr().out
    assert sorted(os.listdir(output.parent)) == [f"corpus.{suffix}" for suffix in ("bin", "hashes", "idx", "meta.json")]
    assert TokenStore(output).num_documents == 400
    assert len(prepare_stores(config_of(tmp_path, output)).train[0].documents.documents) == 392
    with pytest.raises(ConfigError, match=r"corpus\.idx exists"):
        tokenize(config_of(tmp_path, corpus), output)
    with pytest.raises(ConfigError, match="is a token store already"):
        tokenize(config_of(tmp_path, output), tmp_path / "again")
    tokenize(config_of(tmp_path, corpus, corpus), tmp_path / "two")
    assert (tmp_path / "two_00.idx").exists()
    assert (tmp_path / "two_01.idx").exists()
    with pytest.raises(StorageError, match="cannot write"):
        tokenize(config_of(tmp_path, corpus), corpus / "below" / "file")


def test_output_with_too_long_a_name(tmp_path: Path, corpus: Path) -> None:
    """With the longest that is taken every file beside it can have its name."""
    with pytest.raises(ConfigError, match="--output: a file name of 202 bytes; give one of at most 200"):
        tokenize(config_of(tmp_path, corpus), tmp_path / ("ü" * 101))
    longest = tmp_path / ("ü" * 100)
    tokenize(config_of(tmp_path, corpus, corpus), longest)
    assert longest.with_name(f"{longest.name}_01.idx").exists()


def test_interrupted_tokenize_of_several_sources_goes_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text("some text " * 50)
    config, output = config_of(tmp_path, corpus, tmp_path / "b.txt"), tmp_path / "out" / "s"
    write = tokenize_command.write_store

    def stop_at_the_second(prefix: Path, key: str, build: Callable[[Path], float]) -> float:
        if prefix.name == "s_01":
            raise StorageError("stopped")
        return write(prefix, key, build)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_command, "write_store", stop_at_the_second)
        with pytest.raises(StorageError, match="stopped"):
            tokenize(config, output)
    stamp = (tmp_path / "out" / "s_00.bin").stat().st_mtime_ns
    assert tokenize(config, output) == 0
    assert (tmp_path / "out" / "s_00.bin").stat().st_mtime_ns == stamp
    assert TokenStore(tmp_path / "out" / "s_01").num_documents == 1


def fail_to_build(*arguments: object, **names: object) -> float:
    raise DataError("broken line")


@pytest.mark.parametrize("output", [None, "store"])
def test_how_documents_end_is_said_before_they_are_tokenized(
    tmp_path: Path,
    corpus: Path,
    output: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once, however many sources there are, and also when there is nothing to do; not by a start that is rejected."""
    (tmp_path / "b.txt").write_text("some text " * 50)
    prefix = None if output is None else tmp_path / output
    line = "tokenizer builtin:python-4k: 4,096 ids, documents end with '<|endoftext|>' (0, by the usual name)"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build_stores", fail_to_build)
        with pytest.raises(DataError, match="broken line"):
            tokenize(config_of(tmp_path, corpus), prefix)
    assert capsys.readouterr().err.splitlines() == [line]
    for _ in range(2 if output is None else 1):
        tokenize(config_of(tmp_path, corpus, tmp_path / "b.txt"), prefix)
        assert capsys.readouterr().err.splitlines() == [line]
    missing = config_of(tmp_path, tmp_path / "missing.txt")
    for config in (missing, config_of(tmp_path, corpus, tokenizer=str(tmp_path / "missing.json"))):
        with pytest.raises((ConfigError, DataError), match="missing"):
            tokenize(config, prefix)
    assert capsys.readouterr().err == ""


def test_a_rejected_output_is_one_line(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store.idx").touch()
    with pytest.raises(ConfigError, match=r"store\.idx exists"):
        tokenize(config_of(tmp_path, corpus), tmp_path / "store")
    assert capsys.readouterr().err == ""


def test_what_was_interrupted_in_the_cache_goes_with_the_next_one_of_any_text(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a run, between whose interruption and going on there may be another, and not while it is being built."""
    other = tmp_path / "b.txt"
    other.write_text("some text " * 50)

    def left(run: Callable[[], object]) -> list[str]:
        run()
        return [path.name for path in (tmp_path / "cache").glob(".*-partial")]

    def stop(*arguments: object, **names: object) -> float:
        raise StoppedBySignal("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build_stores", stop)
        with pytest.raises(StoppedBySignal):
            tokenize(config_of(tmp_path, corpus), None)
    (partial,) = left(lambda: prepare_stores(config_of(tmp_path, other)))
    with (tmp_path / "cache" / f"{partial.removesuffix('-partial')}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert left(lambda: tokenize(config_of(tmp_path, other), None)) == [partial]
    capsys.readouterr()
    assert left(lambda: tokenize(config_of(tmp_path, other), None)) == []
    assert f"{partial}: removed, left by a tokenization that was interrupted" in capsys.readouterr().err
