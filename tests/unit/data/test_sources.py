from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.sources import PYTHON_STDLIB, FileSource, StoreSource, resolve
from qwen3next_train.errors import ConfigError, DataError
from tests.unit.data.corpus import write_store


def names(source: FileSource | StoreSource) -> list[str]:
    assert isinstance(source, FileSource)
    return [file.name for file in source.files]


def find(name: str | Path, **fields: str) -> FileSource | StoreSource:
    return resolve(SourceConfig(source=str(name), **fields))


def test_standard_library_is_sorted_and_has_no_installed_packages() -> None:
    found = names(find(PYTHON_STDLIB))
    assert found == sorted(found)
    assert {"abc.py", "json/decoder.py"} <= set(found)
    assert not any("site-packages" in name for name in found)


def test_file_folder_and_glob(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.md", "a/.hidden.txt", ".git/y.txt", "a/image.png", "z.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    assert names(find(tmp_path / "b.txt")) == ["b.txt"]
    assert names(find(tmp_path)) == ["a/x.md", "b.txt", "z.jsonl"]
    assert names(find(tmp_path / "**" / "*.png")) == ["a/image.png"]
    assert names(find(tmp_path / "[bz].*")) == ["b.txt", "z.jsonl"]
    assert find(tmp_path / "b.txt") != find(tmp_path / "b.*")  # a glob may leave out what is not UTF-8


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_token_store_by_prefix_or_either_file(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "corpus_text_document", [[1]])
    found = find(tmp_path / f"corpus_text_document{suffix}")
    assert found == StoreSource(str(tmp_path / f"corpus_text_document{suffix}"), tmp_path / "corpus_text_document")


def test_missing_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        find("nowhere.txt")
    with pytest.raises(DataError, match=r"no/such/corpus: no such file"):
        find(tmp_path / "no/such/corpus")
    with pytest.raises(DataError, match=r"empty: no \.jsonl|empty: no \.txt"):
        find(tmp_path / "empty")
    with pytest.raises(DataError, match="no file matches"):
        find(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"a\*\*b: cannot be looked up \(Invalid pattern|no file matches"):
        find(tmp_path / "a**b")
    with pytest.raises(DataError, match="File name too long"):
        find("x" * 5000)
    with pytest.raises(DataError, match="neither a regular file nor a folder"):
        find(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no builtin source"):
        find("builtin:shakespeare")
    with pytest.raises(ConfigError, match="name is empty"):
        find("")


def test_hugging_face_dataset_becomes_its_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder in place of the hub: the library treats both alike."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]}).to_parquet(tmp_path / "set" / "train.parquet")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: load(str(tmp_path / "set"), split=split))
    found = find("somebody/set")
    assert isinstance(found, FileSource)
    assert found.label == "somebody/set:train"
    assert [document.text for document in read_documents(found, Counter())] == ["one", "two"]
    with pytest.raises(DataError, match=r"somebody/set: no column 'body', found \['id', 'text'\]; set text_field"):
        find("somebody/set", text_field="body")
    with pytest.raises(DataError, match="Unknown split"):
        find("somebody/set", split="test")


def test_hugging_face_dataset_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(DataError, match="neither a path nor a Hugging Face dataset") as caught:
        find("nobody/no-such-dataset")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="slices are not supported"):
        find("nobody/no-such-dataset", split="train[:10%]")
