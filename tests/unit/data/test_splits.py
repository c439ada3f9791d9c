from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.sources import FileSource, resolve
from qwen3next_train.errors import DataError


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def find(name: Path, split: str = "train") -> FileSource:
    found = resolve(SourceConfig(source=str(name), split=split))
    assert isinstance(found, FileSource)
    return found


def names(name: Path, split: str = "train") -> list[str]:
    return [file.name for file in find(name, split).files]


def passed_over(name: Path, split: str = "train") -> dict[str, int]:
    return {group.reason: group.num_files for group in find(name, split).passed_over}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "set"
    rows = {split: datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in range(count)]})
            for split, count in (("train", 36), ("test", 4), ("extra_sft", 2))}  # fmt: skip
    datasets.DatasetDict(rows).save_to_disk(path)
    return path


def texts(name: Path, split: str) -> list[str]:
    return [document.text for document in read_documents(find(name, split), {})]


def test_saved_dataset_dict_gives_the_split_that_is_asked_for(saved: Path) -> None:
    assert texts(saved, "train") == [f"train {n}" for n in range(36)]
    assert texts(saved, "test") == [f"test {n}" for n in range(4)]
    assert texts(saved, "extra_sft") == ["extra_sft 0", "extra_sft 1"]
    assert texts(saved.parent, "extra_sft") == ["extra_sft 0", "extra_sft 1"]
    assert texts(saved / "extra_sft", "train") == ["extra_sft 0", "extra_sft 1"]
    assert passed_over(saved) == {"dataset cards and licences": 7, "split extra_sft": 1, "split test": 1}
    with pytest.raises(DataError, match="no split 'validation', found extra_sft, test, train; set split to one"):
        find(saved, "validation")


def test_shards_named_after_their_split(tmp_path: Path) -> None:
    data = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    write(tmp_path, *data, "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001-9af3.parquet")
    assert names(tmp_path) == data
    assert names(tmp_path / "data" / "*") == [Path(name).name for name in data]
    assert names(tmp_path, "test") == ["data/test-00000-of-00001.parquet"]
    assert names(tmp_path, "validation") == names(tmp_path, "dev") != []
    assert passed_over(tmp_path) == {"split test": 1, "split validation": 1}
    for name in (tmp_path, tmp_path / "data", tmp_path / "**" / "*.parquet"):
        with pytest.raises(DataError, match="no split 'nonsense', found test, train, validation; set split to one"):
            find(name, "nonsense")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train.csv.gz", "TEST.csv.gz"),
        ("c4-train.00000-of-01024.json.gz", "c4-test.00000-of-00008.json.gz"),
        ("train/0001.parquet", "test/0001.parquet"),
        ("en/train/0.jsonl", "en/test/0.jsonl"),
        ("ag_news-train-00000-of-00001.arrow", "ag_news-test-00000-of-00001.arrow"),
        ("set_training_1.tsv", "set_eval_1.tsv"),
        ("wiki.train.txt", "wiki.test.txt"),
        ("train/pos/1.txt", "test/pos/1.txt"),
        ("train.jsonl", "held/testing.json"),
        ("corpus.jsonl", "test.jsonl"),
    ],
)
def test_names_that_tell_a_split(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path, train, test)
    assert names(tmp_path) == [train]
    assert names(tmp_path, "test") == [test]
    assert passed_over(tmp_path) == {"split test": 1}
    with pytest.raises(DataError, match="no split 'validation', found test, train"):
        find(tmp_path, "validation")


def test_only_other_splits_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no split 'train', found test; set split to one of them"):
        find(tmp_path)


def test_an_empty_split_is_said_to_be_empty(tmp_path: Path) -> None:
    rows = {"train": ["a"], "test": [], "dev": []}
    splits = {split: datasets.Dataset.from_dict({"text": values}) for split, values in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    for name, split in ((tmp_path / "set", "test"), (tmp_path / "set", "validation"), (tmp_path, "dev")):
        with pytest.raises(
            DataError, match=f"split '{split}' has no records, though dataset_dict.json lists it; choose"
        ):
            find(name, split)
    with pytest.raises(DataError, match="no split 'nonsense', found train"):
        find(tmp_path / "set", "nonsense")


def test_the_folder_of_a_split_may_be_named_with_it(saved: Path) -> None:
    for name, split in (("test", "test"), ("test", "eval"), ("test", "train"), ("extra_sft", "extra_sft")):
        expected = texts(saved, "extra_sft" if name == "extra_sft" else "test")
        assert texts(saved / name, split) == texts(saved / name / "*.arrow", split) == expected
        assert texts(saved / name / "data-00000-of-00001.arrow", split) == expected
    with pytest.raises(DataError, match="no split 'validation', its files name no split; set split to train"):
        find(saved / "test", "validation")


@pytest.mark.parametrize(
    "files",
    [
        ("main.py", "test/test_main.py", "tests/x.py"),
        ("wiki-00000-of-00002.parquet", "wiki-00001-of-00002.parquet"),
        ("part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"),
        ("data-00000-of-00001.arrow",),
        ("latest.jsonl", "contest.jsonl", "development.jsonl", "trains.jsonl"),
        ("a.txt", "test.txt"),
    ],
)
def test_names_that_tell_none_are_all_read(tmp_path: Path, files: tuple[str, ...]) -> None:
    write(tmp_path, *files)
    assert names(tmp_path) == sorted(files, key=lambda name: name.split("/"))


def test_whoever_names_a_split_in_the_path_has_chosen(tmp_path: Path) -> None:
    write(tmp_path, "train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "test/a.jsonl")
    assert names(tmp_path / "test-*.parquet") == ["test-00000-of-00001.parquet"]
    assert names(tmp_path / "test-00000-of-00001.parquet") == ["test-00000-of-00001.parquet"]
    assert names(tmp_path / "test") == ["a.jsonl"]
    with pytest.raises(DataError, match="no split 'validation', found test"):
        find(tmp_path / "test-*.parquet", "validation")
    with pytest.raises(DataError, match="no split 'validation', found test"):
        find(tmp_path / "test-00000-of-00001.parquet", "validation")


def test_what_describes_a_dataset_is_no_document(tmp_path: Path) -> None:
    cards = ["README.md", "LICENSE", "license.txt", "CITATION.md", "dataset_infos.json", "sub/NOTICE.txt", "set.py"]
    root = tmp_path / "set"
    write(root, "sub/a.jsonl", "sub/cache-12ab.arrow", "notes.txt", *cards)
    assert names(root) == ["notes.txt", "sub/a.jsonl"]
    assert passed_over(root) == {
        "dataset cards and licences": 6,
        "caches of the datasets library": 1,
        "loading scripts": 1,
    }


def test_readme_of_plain_text_is_a_document_unless_it_is_a_card(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "README.md", "sub/README.md")
    assert names(tmp_path) == ["README.md", "a.txt", "sub/README.md"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    assert names(tmp_path) == ["a.txt", "sub/README.md"]
    (tmp_path / "README.md").write_text("# A dataset\n")
    (tmp_path / ".gitattributes").touch()
    assert names(tmp_path) == ["a.txt", "sub/README.md"]


def test_damaged_list_of_splits_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "train/data-00000-of-00001.arrow")
    for content in ("", "[]", "{}", '{"splits": 3}', "[" * 100_000):
        (tmp_path / "dataset_dict.json").write_text(content)
        with pytest.raises(DataError, match=r"dataset_dict\.json: not the list of splits") as caught:
            find(tmp_path)
        assert "\n" not in str(caught.value)
