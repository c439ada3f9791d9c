from __future__ import annotations

import gzip
import os
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


def find(source: str | Path, **fields: str) -> FileSource | StoreSource:
    return resolve(SourceConfig(source=str(source), **fields))


def test_standard_library_is_sorted_and_has_no_installed_packages() -> None:
    found = names(find(PYTHON_STDLIB))
    assert found == sorted(found)
    assert {"abc.py", "json/decoder.py"} <= set(found)
    assert not any("site-packages" in name for name in found)


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def passed_over(source: FileSource | StoreSource) -> dict[str, tuple[int, int]]:
    assert isinstance(source, FileSource)
    return {group.reason: (group.num_files, group.num_bytes) for group in source.passed_over}


def test_file_folder_and_glob(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "a/x.md", "a/.hidden.txt", ".git/y.txt", "a/image.png", "z.jsonl")
    assert names(find(tmp_path / "b.txt")) == ["b.txt"]
    assert names(find(tmp_path)) == ["a/x.md", "b.txt", "z.jsonl"]
    assert passed_over(find(tmp_path)) == {"hidden files": (2, 8), ".png": (1, 4)}
    assert names(find(tmp_path / "[bz].*")) == ["b.txt", "z.jsonl"]
    assert find(tmp_path / "b.txt") != find(tmp_path / "b.*")  # a glob may leave out what is not UTF-8
    with pytest.raises(DataError, match=r"no file matches this pattern \(passed over 1 \.png \(4 bytes, such as a/im"):
        find(tmp_path / "**" / "*.png")


def test_every_suffix_in_any_case_is_read_or_counted(tmp_path: Path) -> None:
    read = ["a.txt", "b.MD", "c.rst", "d.py", "e.jsonl", "f.ndjson", "g.JSONLINES", "h.json", "i.csv", "j.tsv"]
    read += ["k.parquet", "l.Arrow", "m.txt.gz", "n.jsonl.zst", "o.json.xz", "p.csv.bz2", "q.TSV.GZ", "r.ndjson.Zst"]
    unread = ["a.pdf", "b.PDF", "c.jsonl.lz4", "d.zip", "e.parquet.gz", "f", "g.bin"]
    write(tmp_path, *read, *unread)
    found = find(tmp_path)
    assert names(found) == sorted(read)
    assert passed_over(found) == {
        ".pdf": (2, 8),
        ".lz4": (1, 4),
        ".zip": (1, 4),
        ".parquet.gz": (1, 4),
        "files without suffix": (1, 4),
        ".bin": (1, 4),
    }
    assert (names(find(tmp_path / "*")), passed_over(find(tmp_path / "*"))) == (names(found), passed_over(found))
    (tmp_path / "g.bin").unlink()
    for name in ("a.pdf", "b.PDF", "c.jsonl.lz4", "d.zip", "e.parquet.gz"):
        with pytest.raises(DataError, match=rf"{name}: \.\S+ files are not read; convert it, or rename it"):
            find(tmp_path / name)
    assert names(find(tmp_path / "f")) == ["f"]  # text, as whoever names a file without suffix says


def test_documents_of_a_compressed_file_beside_a_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "s.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'))
    found = find(tmp_path)
    assert isinstance(found, FileSource)
    assert [document.text for document in read_documents(found, {})] == ["a", "b", "c"]
    assert passed_over(found) == {"dataset cards and licences": (1, 8)}


def test_files_without_a_byte_are_counted_not_read(tmp_path: Path) -> None:
    write(tmp_path, "full.txt")
    for name in ("a.gz", "a.txt", "b.jsonl", "c.json.zst", "d.csv.gz", "e.txt.xz", "f.parquet"):
        (tmp_path / name).touch()
    found = find(tmp_path)
    # An empty table is damaged, which is said when it is read.
    assert names(found) == ["f.parquet", "full.txt"]
    assert passed_over(found) == {"empty files": (5, 0), ".gz": (1, 0)}
    assert isinstance(found, FileSource)
    assert {group.example for group in found.passed_over} == {"a.gz", "a.txt"}


def test_a_hard_link_and_a_file_of_no_format_behind_a_link(tmp_path: Path) -> None:
    """The second as the hub's cache has it: a link to a file without suffix in another folder of the same source."""
    write(tmp_path, "a/x.jsonl", "blobs/0123", "snapshots/placeholder.md")
    (tmp_path / "b.jsonl").hardlink_to(tmp_path / "a/x.jsonl")
    (tmp_path / "snapshots/data.jsonl").symlink_to("../blobs/0123")
    found = find(tmp_path)
    assert names(found) == ["a/x.jsonl", "snapshots/data.jsonl", "snapshots/placeholder.md"]
    assert passed_over(found) == {"files without suffix": (1, 4), "links to files that are read already": (1, 4)}


def test_brackets_in_names(tmp_path: Path) -> None:
    write(tmp_path, "data[1]/x[2].jsonl", "data[1]/y.jsonl", "data1/z.jsonl")
    assert names(find(tmp_path / "data[1]")) == ["x[2].jsonl", "y.jsonl"]
    assert names(find(tmp_path / "data[1]" / "*.jsonl")) == ["x[2].jsonl", "y.jsonl"]
    assert names(find(tmp_path / "data[1]" / "**" / "y.jsonl")) == ["y.jsonl"]
    assert names(find(tmp_path / "data[1]" / "x[2].jsonl")) == ["x[2].jsonl"]
    assert names(find(tmp_path / "dat?[1]" / "*.jsonl")) == ["data1/z.jsonl"]
    with pytest.raises(DataError, match=r"no file matches this pattern, in which \[ begins a set of characters"):
        find(tmp_path / "nothing[1]" / "*.jsonl")
    with pytest.raises(DataError, match=r"data\[1\]/missing\.jsonl: no such file"):
        find(tmp_path / "data[1]" / "missing.jsonl")


def test_a_file_called_like_the_pattern_does_not_hide_what_it_matches(tmp_path: Path) -> None:
    write(tmp_path, "*.jsonl", "a.jsonl", "b.jsonl")
    assert names(find(tmp_path / "*.jsonl")) == ["*.jsonl", "a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_token_store_by_prefix_or_either_file(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "corpus_text_document", [[1]])
    found = find(tmp_path / f"corpus_text_document{suffix}")
    assert found == StoreSource(str(tmp_path / f"corpus_text_document{suffix}"), tmp_path / "corpus_text_document")


def test_a_store_beside_text_is_no_text_and_counts_as_no_dataset(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "readme.md", "s.bin", "s.idx", "s.hashes", "s.meta.json")
    found = find(tmp_path)
    assert isinstance(found, FileSource)
    assert names(found) == ["a.md", "readme.md"]
    assert {group.reason for group in found.passed_over} == {"token stores", ".bin", ".idx", ".hashes"}
    # Without an index it is somebody else's file.
    (tmp_path / "s.idx").unlink()
    assert "s.meta.json" in names(find(tmp_path))


def test_a_folder_of_stores_alone_says_how_to_name_one(tmp_path: Path) -> None:
    write(tmp_path, "s.bin", "s.idx", "s.meta.json")
    with pytest.raises(DataError) as error:
        find(tmp_path)
    assert str(error.value).endswith(f"; name a token store by what its files share, such as {tmp_path}/s")


def test_missing_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        find("nowhere.txt")
    with pytest.raises(DataError, match=r"~nobody/a\.txt: no such file"):
        find("./~nobody/a.txt")
    with pytest.raises(DataError, match=r"no/such/corpus: no such file"):
        find(tmp_path / "no/such/corpus")
    with pytest.raises(DataError, match=r"empty: no \.txt and other text, \.jsonl"):
        find(tmp_path / "empty")
    with pytest.raises(DataError, match="no file matches"):
        find(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"a\*\*b: cannot be looked up \(Invalid pattern|no file matches"):
        find(tmp_path / "a**b")
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
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: load(str(tmp_path / "set"), split=split))
    found = find("somebody/set")
    assert isinstance(found, FileSource)
    assert found.label == "somebody/set:train"
    assert [document.text for document in read_documents(found, {})] == ["one", "two"]
    with pytest.raises(DataError, match=r"somebody/set: no column 'body', found \['id', 'text'\]; set text_field"):
        find("somebody/set", text_field="body")
    with pytest.raises(DataError, match="Unknown split"):
        find("somebody/set", split="test")


def test_hugging_face_dataset_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(DataError, match="neither a path nor a Hugging Face dataset") as caught:
        find("nobody/no-such-dataset")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="parts of one are not read"):
        find("nobody/no-such-dataset", split="train[:10%]")


def test_configuration_name_goes_to_the_hub_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    def load(path: str, **options: str) -> datasets.Dataset:
        asked.append({"path": path, **options})
        raise ValueError("Config name is missing")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for fields in ({}, {"name": "en"}, {"name": "en", "split": "test"}):
        with pytest.raises(DataError, match=r"Config name is missing.*the source's name and split"):
            find("somebody/set", **fields)
    assert asked == [
        {"path": "somebody/set", "split": "train"},
        {"path": "somebody/set", "split": "train", "name": "en"},
        {"path": "somebody/set", "split": "test", "name": "en"},
    ]
    write(tmp_path, "a.txt")
    write_store(tmp_path / "store", [[1]])
    for source in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt", tmp_path / "store", PYTHON_STDLIB):
        with pytest.raises(ConfigError, match="name 'en' is for datasets of the Hugging Face hub"):
            find(source, name="en")


def test_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b/c.jsonl")
    write_store(tmp_path / "store", [[1]])
    sources = (tmp_path, tmp_path / "a.txt", tmp_path / "b/c.jsonl", tmp_path / "*.txt", tmp_path / "store")
    for source in (*sources, tmp_path / "store.bin", PYTHON_STDLIB):
        with pytest.raises(DataError, match="no split 'dev', its files name no split; set split to train"):
            find(source, split="dev")


@pytest.mark.parametrize("split", ["train[:90%]", "train[10:20]", "train[", "train[:50%]+test", "a b", " train"])
def test_a_part_of_a_split_is_refused_wherever_the_source_lies(tmp_path: Path, split: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for source in (str(tmp_path / "a.jsonl"), str(tmp_path), "no/such-dataset"):
        with pytest.raises(ConfigError) as caught:
            resolve(SourceConfig(source=source, split=split))
        assert str(caught.value) == (
            f"{source}: split {split!r}: not the name of a split, and parts of one are not read; name a whole split, "
            "and hold text out by data.validation_fraction"
        )
