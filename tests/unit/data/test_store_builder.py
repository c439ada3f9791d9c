from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data import store_builder
from qwen3next_train.data.build_journal import JOURNAL_NAME, Journal
from qwen3next_train.data.formats import ByteStream
from qwen3next_train.data.left_out import LeftOut, LeftOuts
from qwen3next_train.data.sources import FileSource, resolve
from qwen3next_train.data.store_builder import build_stores
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.errors import StorageError


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what is in no file is lost."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileSource:
    """Three files, of which some documents are left out, in some ten batches."""
    monkeypatch.setattr(store_builder, "GROUP_CHARS", 500)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        texts = ["" if n % 9 == 4 else None if n % 9 == 7 else f"{name} {n} " + "wörd " * (n % 13) for n in range(90)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "c.txt").write_text("the last document " * 20)
    resolved = resolve(SourceConfig(source=str(folder)))
    assert isinstance(resolved, FileSource)
    return resolved


def build(source: FileSource, directory: Path) -> LeftOuts:
    directory.mkdir(exist_ok=True)
    skipped: LeftOuts = {}
    build_stores(
        source,
        Tokenizer(BUILTIN),
        train_prefix=directory / "train",
        validation_prefix=directory / "validation",
        held_out_fraction=0.3,
        skipped=skipped,
        entry="entry",
    )
    return skipped


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != JOURNAL_NAME}


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[FileSource, Path, int], bool]:
    """Build until the journal was written some times; tells whether there was something left to do."""

    def run(source: FileSource, directory: Path, num_records: int) -> bool:
        count, write = 0, Journal.write

        def counted(journal: Journal, path: Path) -> None:
            nonlocal count
            write(journal, path)
            count += 1
            if count == num_records:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", counted)
            try:
                build(source, directory)
            except Killed:
                return True
        return False

    return run


def test_killed_at_any_batch_goes_on_to_the_same_files(
    tmp_path: Path,
    source: FileSource,
    kill_after: Callable[[FileSource, Path, int], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_out = build(source, tmp_path / "reference")
    reference = files_in(tmp_path / "reference")
    assert sorted(reference) == sorted(
        f"{part}.{suffix}" for part in ("train", "validation") for suffix in ("bin", "hashes", "idx", "meta.json")
    )
    assert left_out == {"empty": LeftOut(20, "a.jsonl:5"), "null": LeftOut(20, "a.jsonl:8")}
    encoded: list[str] = []
    encode = Tokenizer.encode_documents

    def counted(self: Tokenizer, texts: list[str]) -> Iterator[npt.NDArray[np.int64]]:
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_documents", counted)
    num_kills = 0
    for num_records in range(1, 100):
        directory = tmp_path / str(num_records)
        encoded.clear()
        if not kill_after(source, directory, num_records):
            break
        num_kills += 1
        assert build(source, directory) == left_out
        assert files_in(directory) == reference
        assert len(encoded) == 141, "a document that was done was tokenised again"
    assert num_kills > 8
    # Killed again and again, after every batch.
    while kill_after(source, tmp_path / "often", 1):
        pass
    assert files_in(tmp_path / "often") == reference


def test_killed_between_the_parts_of_a_single_text_goes_on_to_the_same_files(
    tmp_path: Path, source: FileSource, kill_after: Callable[[FileSource, Path, int], bool]
) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {number} of the only text\n" for number in range(100)))
    only = resolve(SourceConfig(source=str(tmp_path / "book.txt")))
    assert isinstance(only, FileSource)
    build(only, tmp_path / "reference")
    for num_records in (1, 2):
        assert kill_after(only, tmp_path / str(num_records), num_records)
        build(only, tmp_path / str(num_records))
        assert files_in(tmp_path / str(num_records)) == files_in(tmp_path / "reference")
    assert len(files_in(tmp_path / "reference")) == 8


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path / "x").mkdir(parents=True)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, fifo, folder, cut, Path.unlink])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "train.lengths", JOURNAL_NAME])
def test_damaged_unfinished_stores_are_begun_anew(
    tmp_path: Path,
    source: FileSource,
    kill_after: Callable[[FileSource, Path, int], bool],
    damage: Callable[[Path], None],
    name: str,
) -> None:
    left_out = build(source, tmp_path / "reference")
    assert kill_after(source, tmp_path / "killed", 5)
    damage(tmp_path / "killed" / name)
    assert build(source, tmp_path / "killed") == left_out
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "reference")


@pytest.mark.parametrize("name", ["train.bin.tmp", "train.idx.tmp", "train.idx", "train.meta.json", "journal.json.tmp"])
@pytest.mark.parametrize("put", [fifo, folder])
def test_strange_files_under_our_names_are_replaced(
    tmp_path: Path, source: FileSource, name: str, put: Callable[[Path], None]
) -> None:
    (tmp_path / "built").mkdir()
    put(tmp_path / "built" / name)
    build(source, tmp_path / "built")
    assert TokenStore(tmp_path / "built" / "train").num_documents > 90


def test_finished_stores_are_not_built_again_unless_damaged(tmp_path: Path, source: FileSource) -> None:
    left_out = build(source, tmp_path / "built")
    reference = files_in(tmp_path / "built")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "built").iterdir()}
    assert build(source, tmp_path / "built") == left_out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    flip(tmp_path / "built" / "validation.bin")
    assert build(source, tmp_path / "built") == left_out
    assert files_in(tmp_path / "built") == reference


def test_a_source_that_fails_meanwhile_is_no_damaged_one_and_is_gone_on_with(
    tmp_path: Path, source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, tmp_path / "reference")
    real = ByteStream.readline

    def fail(stream: ByteStream, size: int) -> bytes:
        line = real(stream, size)
        if b'"b 50 ' in line:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return line

    with monkeypatch.context() as patch:
        patch.setattr(ByteStream, "readline", fail)
        with pytest.raises(StorageError, match=r"b\.jsonl: cannot be read \(Input/output error\)"):
            build(source, tmp_path / "built")
    assert Journal.read(tmp_path / "built" / JOURNAL_NAME) is not None
    build(source, tmp_path / "built")
    assert files_in(tmp_path / "built") == files_in(tmp_path / "reference")
