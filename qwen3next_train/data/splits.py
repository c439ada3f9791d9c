"""Which of a folder's files are documents of the split that is asked for: datasets as Hugging Face's tools store them.

A file's split is told by the dataset it was saved in (``dataset_dict.json``), by a shard's name
(``train-00000-of-00004.parquet``), or by a word such as ``test`` or ``valid`` as part of the name of the file or of a
folder on the way to it, as in the Hugging Face hub's own rules. Text files count only where all files have a split, for
a ``test`` folder among sources is no held-out set. A file without split belongs to ``train``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.data.folders import Collection, SourceFile
from qwen3next_train.data.formats import format_of, suffix_of
from qwen3next_train.data.reading import read_small_file
from qwen3next_train.errors import DataError

DEFAULT_SPLIT = "train"

_SYNONYMS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_WORD = re.compile(r"[a-z]+")

_DICT_NAME = "dataset_dict.json"
_MAX_DICT_BYTES = 1 << 20
_METADATA = frozenset(("dataset_infos.json", "dataset_info.json", _DICT_NAME, "state.json"))
_STORE_META = ".meta.json"
_CARD = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|requirements)([-_.].*)?"
)


def choose_documents(
    found: Collection, split: str, where: str, *, folder: str = "", pattern: Sequence[str] = ()
) -> None:
    """Pass over what is no document, and files of other splits.

    Args:
        found: all files of a folder or glob.
        split: the split that is asked for.
        where: the source, for messages.
        folder: name of the folder that the names of the files begin in; where it is the split that is asked for and
            no file tells one, all belong to it.
        pattern: parts of the glob; one that names a split has chosen already, unless another is asked for.

    Raises:
        DataError: there is no file of that split.
    """
    datasets = _dataset_folders(found.files)
    saved = {
        _folder(file.name): _splits_listed_in(file.path) for file in found.files if file.path.name.lower() == _DICT_NAME
    }
    found.pass_over_where(lambda file: _reason(file, datasets))
    asked = _SYNONYMS.get(split.lower(), split)
    marks = {file: _split_of(file.name, asked, saved) for file in found.files}
    if not all(marks.values()):
        marks = {file: mark if _holds_records(file) else None for file, mark in marks.items()}
    if asked == DEFAULT_SPLIT and _split_of("/".join(pattern), asked, {}) is not None:
        return
    is_folder_of_split = not any(marks.values()) and asked in (folder, _SYNONYMS.get(folder.lower()))
    unmarked = asked if is_folder_of_split else DEFAULT_SPLIT
    splits = {file: mark or unmarked for file, mark in marks.items()}
    if splits and asked not in splits.values():
        if any(asked == _SYNONYMS.get(name, name) for names in saved.values() for name in names):
            raise DataError(
                f"{where}: split {split!r} has no records, though {_DICT_NAME} lists it; choose another split, or copy "
                "the dataset again if it should have some"
            )
        present = splits.values() if any(marks.values()) else ()
        raise no_split(split, present, where)
    found.pass_over_where(lambda file: None if splits[file] == asked else f"split {splits[file]}")


def no_split(split: str, present: Iterable[str], where: str) -> DataError:
    """The error for a split that is not there; ``present`` is what is."""
    listed = ", ".join(sorted(set(present)))
    return DataError(
        f"{where}: no split {split!r}, {f'found {listed}' if listed else 'its files name no split'}; "
        f"set split to {'one of them' if listed else DEFAULT_SPLIT}"
    )


def _dataset_folders(files: Iterable[SourceFile]) -> frozenset[str]:
    """Folders that hold a dataset, with records or what describes them, and the top one if any does."""
    folders = {_folder(file.name) for file in files if _holds_records(file) or _describes_dataset(file)}
    return frozenset(folders | {""} if folders else folders)


def _describes_dataset(file: SourceFile) -> bool:
    name = file.path.name.lower()
    if name != "readme.md":
        return name in _METADATA
    if (file.path.parent / ".gitattributes").exists():
        return True
    with suppress(OSError), file.path.open("rb") as stream:
        return stream.read(4) == b"---\n"
    return False


def _reason(file: SourceFile, datasets: frozenset[str]) -> str | None:
    """Why a file is not read, whatever the split; None if it is."""
    name = file.path.name.lower()
    in_dataset = _folder(file.name) in datasets
    if name in _METADATA or (in_dataset and not _holds_records(file) and _CARD.fullmatch(name)):
        return "dataset cards and licences"
    if _describes_store(file):
        return "token stores"
    if format_of(name) is None:
        return suffix_of(name) or "files without suffix"
    if in_dataset and name.startswith("cache-") and name.endswith(".arrow"):
        return "caches of the datasets library"
    if in_dataset and name == f"{file.path.parent.name.lower()}.py":
        return "loading scripts"
    return None


def _holds_records(file: SourceFile) -> bool:
    file_format = format_of(file.path.name)
    holds_records = file_format is not None and file_format.holds_records
    return holds_records and file.path.name.lower() not in _METADATA and not _describes_store(file)


def _describes_store(file: SourceFile) -> bool:
    """Whether a JSON file is part of a token store, which ``tokenize --output`` may have written beside its text."""
    prefix = file.path.name.removesuffix(_STORE_META)
    return prefix != file.path.name and file.path.with_name(f"{prefix}.idx").exists()


def _splits_listed_in(path: Path) -> frozenset[str]:
    """Splits of a dataset that ``DatasetDict.save_to_disk`` wrote."""
    raw = read_small_file(path, max_bytes=_MAX_DICT_BYTES)
    try:
        return frozenset(str(name) for name in json.loads(raw)["splits"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not the list of splits of a saved dataset ({json_problem(error)}); repair or remove it"
        ) from None


def _split_of(name: str, asked: str, saved: dict[str, frozenset[str]]) -> str | None:
    """The split that a file's relative name tells, None if it tells none."""
    for folder, splits in saved.items():
        prefix = f"{folder}/" if folder else ""
        child = name.removeprefix(prefix).partition("/")[0]
        if name.startswith(prefix) and child in splits:
            return _SYNONYMS.get(child, child)
    *folders, file = name.split("/")
    shard = _SHARD.match(file)
    if shard is not None and (shard["split"] == asked or _word_in(shard["split"]) is not None):
        return _SYNONYMS.get(shard["split"].lower(), shard["split"])
    return next((split for part in (*folders, file) if (split := _word_in(part)) is not None), None)


def _word_in(part: str) -> str | None:
    return next((_SYNONYMS[word] for word in _WORD.findall(part.lower()) if word in _SYNONYMS), None)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
