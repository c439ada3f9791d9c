from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen3next_train.data import digests
from qwen3next_train.data.digests import digest_files, digest_store
from qwen3next_train.data.sources import SourceFile
from tests.unit.data.corpus import write_store


def old_file(path: Path, content: str) -> SourceFile:
    path.write_text(content)
    os.utime(path, ns=(10**18, 10**18))
    return SourceFile(path.name, path)


def test_content_and_names_count_places_do_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    here = [old_file(tmp_path / "a", "1"), old_file(tmp_path / "b", "2")]
    there = [old_file(tmp_path / "other" / "a", "1"), old_file(tmp_path / "other" / "b", "2")]
    reference = digest_files(here, tmp_path / "cache")
    assert digest_files(there, tmp_path / "cache") == reference
    assert digest_files(here[::-1], tmp_path / "cache") != reference
    assert digest_files(here[:1], tmp_path / "cache") != reference
    assert digest_files([SourceFile("c", tmp_path / "a"), here[1]], tmp_path / "cache") != reference


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [old_file(tmp_path / "a", "1")]
    reference = digest_files(files, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", None)
        assert digest_files(files, tmp_path / "cache") == reference
    old_file(tmp_path / "a", "22")
    assert digest_files(files, tmp_path / "cache") != reference


def test_files_just_written_are_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    reference = digest_files([SourceFile("a", path)], tmp_path / "cache")
    stamp = path.stat().st_mtime_ns
    path.write_text("2")
    os.utime(path, ns=(stamp, stamp))
    assert digest_files([SourceFile("a", path)], tmp_path / "cache") != reference


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', '{"x": []}'])
def test_damaged_memo_only_costs_time(tmp_path: Path, content: str) -> None:
    files = [old_file(tmp_path / "a", "1")]
    reference = digest_files(files, tmp_path / "cache")
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    memo.write_text(content)
    assert digest_files(files, tmp_path / "cache") == reference


def test_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    files = [old_file(tmp_path / "a", "1")]
    assert digest_files(files, tmp_path / "a" / "cache") == digest_files(files, tmp_path / "cache")


def test_store_digest_sees_index_tokens_and_not_the_place(tmp_path: Path) -> None:
    def digest(name: str, documents: list[list[int]]) -> str:
        return digest_store(write_store(tmp_path / name, documents))

    reference = digest("a", [[1, 2], [3]])
    assert digest("b", [[1, 2], [3]]) == reference
    assert len({reference, digest("c", [[1], [2, 3]]), digest("d", [[1, 2], [4]]), digest("e", [[1, 2]])}) == 4
