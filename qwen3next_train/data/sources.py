"""Where documents come from: resolves what the user named into files, a token store or a Hugging Face dataset.

==============================  =================================================================
``builtin:python-stdlib``       the running interpreter's own library sources, one document a file
file, glob or folder            ``.jsonl[.gz]``, ``.json[.gz]`` (JSON lines too), ``.parquet``,
                                ``.arrow``: one document a line or row; anything else is UTF-8 text,
                                one document a file
``PREFIX`` (``.bin``, ``.idx``) a token store, Megatron-LM's or ours
``owner/name``                  a Hugging Face dataset, when no such path exists
==============================  =================================================================

Reading the documents of resolved files is in :mod:`~qwen3next_train.data.documents`.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.token_store import store_paths
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.log import get_logger

PYTHON_STDLIB = "builtin:python-stdlib"
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SourceFile:
    """One file to read documents from.

    Args:
        name: path relative to what the user named, ``/`` between parts; decides where a text file is held out.
        path: where it lies.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class FileSource:
    """Files that hold text, in the order in which they are tokenised.

    Args:
        label: the source as the user wrote it.
        files: at least one.
        text_field: column or JSON key with the text.
        lenient: text files that are not UTF-8 are skipped and counted instead of rejected.
    """

    label: str
    files: tuple[SourceFile, ...]
    text_field: str
    lenient: bool


@dataclass(frozen=True)
class StoreSource:
    """A token store.

    Args:
        label: the source as the user wrote it.
        prefix: path without ``.bin`` and ``.idx``.
    """

    label: str
    prefix: Path


def resolve(source: SourceConfig) -> FileSource | StoreSource:
    """Find out what a source is.

    Raises:
        ConfigError: an empty or unknown ``builtin:`` name, or a slice as split.
        DataError: nothing of that name exists, or it is a folder or glob without readable files, or a dataset
            that cannot be loaded.
    """
    try:
        return _resolve(source)
    except (OSError, ValueError) as error:  # no permission, name too long; not a pattern
        raise DataError(f"{source.source}: cannot be looked up ({error}); check data.sources") from None


def _resolve(source: SourceConfig) -> FileSource | StoreSource:
    label = source.source
    if label.startswith("builtin:"):
        if label != PYTHON_STDLIB:
            raise ConfigError(f"data.sources: no builtin source {label!r}; the only one is {PYTHON_STDLIB}")
        return FileSource(label, tuple(_stdlib_files()), source.text_field, lenient=True)
    if not label:
        raise ConfigError("data.sources: a source's name is empty; name a file, a folder or a dataset")
    path = Path(label).expanduser()
    if path.is_file() and path.suffix in (".bin", ".idx"):
        return StoreSource(label, path.with_suffix(""))
    if path.is_file():
        return FileSource(label, (SourceFile(path.name, path),), source.text_field, lenient=False)
    if path.name and any(candidate.is_file() for candidate in store_paths(path)[:2]):
        return StoreSource(label, path)
    if path.is_dir():
        files = _files_below(path, sorted(path.rglob("*")), suffixes=TEXT_SUFFIXES + RECORD_SUFFIXES)
        return _file_source(source, files, f"no {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)} file in this folder")
    if any(character in label for character in "*?["):
        root, pattern = _split_glob(path)
        files = _files_below(root, sorted(root.glob(pattern)) if pattern else [], suffixes=None)
        return _file_source(source, files, "no file matches this pattern")
    if path.exists():
        raise DataError(f"{label}: neither a regular file nor a folder; name one")
    if _HUB_NAME.fullmatch(label) and not label.endswith(
        (*TEXT_SUFFIXES, *RECORD_SUFFIXES, ".bin", ".idx", ".gz", ".json")
    ):
        return _hub_source(source)
    raise DataError(f"{label}: no such file, folder or token store; check data.sources")


def _file_source(source: SourceConfig, files: Iterator[SourceFile], complaint: str) -> FileSource:
    found = tuple(files)
    if not found:
        raise DataError(f"{source.source}: {complaint}; check data.sources")
    return FileSource(source.source, found, source.text_field, lenient=True)


def _stdlib_files() -> Iterator[SourceFile]:
    """All ``.py`` files of the standard library, sorted by relative path; installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    by_name = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(by_name):
        if not {"site-packages", "dist-packages"}.intersection(name.split("/")) and by_name[name].is_file():
            yield SourceFile(name, by_name[name])


def _files_below(root: Path, paths: list[Path], *, suffixes: tuple[str, ...] | None) -> Iterator[SourceFile]:
    """Regular files among ``paths``; hidden files and folders (``.git``) are left out."""
    for path in paths:
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (suffixes is None or path.name.endswith(suffixes)) and path.is_file():
            yield SourceFile(name.as_posix(), path)


def _split_glob(path: Path) -> tuple[Path, str]:
    """Split ``a/b/*.txt`` into the folder without wildcards and the pattern below it."""
    parts = path.parts
    first = next(index for index, part in enumerate(parts) if any(character in part for character in "*?["))
    return Path(*parts[:first]), "/".join(parts[first:])


def _hub_source(source: SourceConfig) -> FileSource:
    """Download a dataset of the Hugging Face hub (or take it from the local cache) as arrow files.

    ``datasets`` runs no code from the hub (script datasets are gone since 4.0), and none is allowed here.
    """
    if not re.fullmatch(r"[\w.+-]+", source.split):
        raise ConfigError(f"data.sources: split {source.split!r}: slices are not supported; name whole splits")
    import datasets

    get_logger().info("%s: no such path; loading the Hugging Face dataset of that name", source.source)
    try:
        dataset = datasets.load_dataset(source.source, split=source.split)
    except Exception as error:  # noqa: BLE001  the hub client raises classes of half a dozen libraries
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.source}: neither a path nor a Hugging Face dataset that can be loaded ({reason}); "
            "check data.sources and the network"
        ) from None
    if source.text_field not in dataset.column_names:
        raise DataError(
            f"{source.source}: no column {source.text_field!r}, found {dataset.column_names}; set text_field"
        )
    files = tuple(SourceFile(Path(entry["filename"]).name, Path(entry["filename"])) for entry in dataset.cache_files)
    if not files:
        raise DataError(f"{source.source}: split {source.split!r} is empty; choose another split")
    return FileSource(f"{source.source}:{source.split}", files, source.text_field, lenient=False)
