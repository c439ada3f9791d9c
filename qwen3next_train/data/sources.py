"""Where documents come from: resolves what the user named into files, a token store or a Hugging Face dataset.

==============================  =================================================================
``builtin:python-stdlib``       the running interpreter's own library sources, one document a file
file, folder or glob            what :data:`~qwen3next_train.data.formats.FORMATS` lists; a file without
                                suffix is text when it is named itself. Of a folder or glob, everything
                                else is passed over and counted; a file named by itself is rejected
``PREFIX`` (``.bin``, ``.idx``) a token store, Megatron-LM's or ours
``owner/name``                  a Hugging Face dataset, when no such path exists
==============================  =================================================================

Reading the documents of resolved files is in :mod:`~qwen3next_train.data.documents`.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3next_train.config.error_lines import show_name
from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.folders import (
    Collection,
    PassedOver,
    SourceFile,
    collect_folder,
    collect_glob,
    matches_itself,
)
from qwen3next_train.data.formats import COMPRESSIONS, READ, Format, format_of, suffix_of
from qwen3next_train.data.reading import read_error
from qwen3next_train.data.splits import DEFAULT_SPLIT, choose_documents, no_split
from qwen3next_train.data.token_store import store_paths
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.log import get_logger

PYTHON_STDLIB = "builtin:python-stdlib"
_CHECK_NAME = "check the source's name"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class FileSource:
    """Files that hold text, in the order in which they are tokenised.

    Args:
        label: the source as the user wrote it.
        files: at least one.
        text_field: column or JSON key with the text.
        lenient: text files that are not UTF-8 are skipped and counted instead of rejected.
        passed_over: files of the folder or glob that are not read.
    """

    label: str
    files: tuple[SourceFile, ...]
    text_field: str
    lenient: bool
    passed_over: tuple[PassedOver, ...] = ()


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
        ConfigError: an empty or unknown ``builtin:`` name, a slice as split, or a configuration name for something
            else than a Hugging Face dataset.
        DataError: nothing of that name exists, or it is a file that is not read, a folder or glob without readable
            files or without the split, or a dataset that cannot be loaded.
        StorageError: it cannot be looked up now (permission, a failing disk).
    """
    try:
        return _resolve(source)
    except OSError as error:
        raise read_error(Path(error.filename or source.source), error) from None
    except ValueError as error:  # a zero byte; not a pattern
        raise DataError(f"{source.source}: cannot be looked up ({error}); {_CHECK_NAME}") from None


def _resolve(source: SourceConfig) -> FileSource | StoreSource:
    label = source.source
    if not label:
        raise ConfigError("a source's name is empty (got ''); name a file, a folder or a dataset")
    if not re.fullmatch(r"[\w.+-]+", source.split):
        raise ConfigError(
            f"{label}: split {source.split!r}: not the name of a split, and parts of one are not read; name a whole "
            "split, and hold text out by data.validation_fraction"
        )
    found = resolve_local(source)
    if found is None:
        return _hub_source(source)
    if source.name:
        raise ConfigError(
            f"{label}: name {source.name!r} is for datasets of the Hugging Face hub; "
            "for files name the folder or file itself"
        )
    return found


def resolve_local(source: SourceConfig) -> FileSource | StoreSource | None:
    """What the source is on this machine; None for a name that can only be a dataset of the hub."""
    label = source.source
    path = Path(label)
    if label.startswith("builtin:"):
        if label != PYTHON_STDLIB:
            raise ConfigError(f"{label}: no builtin source; the only one is {PYTHON_STDLIB}")
        _require_default_split(source)
        return FileSource(label, tuple(_stdlib_files()), source.text_field, lenient=True)
    if path.is_file() and path.suffix in (".bin", ".idx"):
        _require_default_split(source)
        return StoreSource(label, path.with_suffix(""))
    if path.is_file() and not _is_pattern(path):
        return _single_file(source, path)
    if path.name and any(candidate.is_file() for candidate in store_paths(path)[:2]):
        _require_default_split(source)
        return StoreSource(label, path)
    if path.is_dir():
        return _file_source(source, collect_folder(path), f"no {READ} file in this folder", path)
    if path.exists() and not _is_pattern(path):
        raise DataError(f"{label}: neither a regular file nor a folder; name one")
    root, pattern = _split_glob(path)
    if any(_has_wildcard(part) for part in pattern):
        found = collect_glob(root, pattern) if root.is_dir() else Collection()
        complaint = "no file matches this pattern"
        if "[" in label:
            complaint += ", in which [ begins a set of characters ([[] is a bracket)"
        return _file_source(source, found, complaint, root, pattern)
    if _HUB_NAME.fullmatch(label) and format_of(label) is None and not label.endswith((".bin", ".idx", *COMPRESSIONS)):
        return None
    raise DataError(f"{label}: no such file, folder or token store; {_CHECK_NAME}")


def _single_file(source: SourceConfig, path: Path) -> FileSource:
    suffix = suffix_of(path.name)
    if suffix and format_of(path.name) is None:
        raise DataError(
            f"{source.source}: {suffix} files are not read; convert it, or rename it if it is one of {READ}"
        )
    found = Collection()
    found.files.append(SourceFile(path.name, path))
    # Whoever names a file has chosen it, whatever split its name tells, unless another one is asked for.
    choose_documents(found, source.split, source.source, folder=path.absolute().parent.name, pattern=(path.name,))
    return FileSource(source.source, (SourceFile(path.name, path),), source.text_field, lenient=False)


def _file_source(
    source: SourceConfig, found: Collection, complaint: str, folder: Path, pattern: Sequence[str] = ()
) -> FileSource:
    choose_documents(found, source.split, source.source, folder=folder.absolute().name, pattern=pattern)
    found.pass_over_where(lambda file: "empty files" if _is_empty(file) else None)
    found.pass_over_repeated()
    if not found.files:
        listed = f" ({format_passed_over(found.passed_over)})" if found.passed_over else ""
        stores = (each.example.removesuffix(".idx") for each in found.passed_over if each.reason == ".idx")
        store = next(stores, None)
        hint = f"name a token store by what its files share, such as {folder / store}" if store else _CHECK_NAME
        raise DataError(f"{source.source}: {complaint}{listed}; {hint}")
    return FileSource(source.source, tuple(found.files), source.text_field, True, found.passed_over)


def _require_default_split(source: SourceConfig) -> None:
    if source.split != DEFAULT_SPLIT:
        raise no_split(source.split, (), source.source)


def format_passed_over(passed_over: Sequence[PassedOver]) -> str:
    """What is not read of a source, in one line."""
    parts = [
        f"{group.num_files} {show_name(group.reason)} "
        f"({format_bytes(group.num_bytes)}, such as {show_name(str(group.example))})"
        for group in passed_over
    ]
    return f"passed over {', '.join(parts)}"


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for people: ``1.2 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _stdlib_files() -> Iterator[SourceFile]:
    """All ``.py`` files of the standard library, sorted by relative path; installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    by_name: dict[str, Path] = {}
    for folder, inside, names in os.walk(root):
        # Not entered: they may hold many times as many files.
        inside[:] = set(inside) - {"site-packages", "dist-packages"}
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        by_name |= {path.relative_to(root).as_posix(): path for path in paths}
    for name in sorted(by_name):
        if by_name[name].is_file():
            yield SourceFile(name, by_name[name])


def _is_empty(file: SourceFile) -> bool:
    """Whether a file holds no byte. Tables have a schema at least, so an empty one is damaged."""
    file_format = format_of(file.path.name)
    if file_format is not None and file_format.kind in (Format.PARQUET, Format.ARROW):
        return False
    try:
        return file.path.stat().st_size == 0
    except OSError:  # gone since; that is said when it is read
        return False


def _has_wildcard(part: str) -> bool:
    return any(character in part for character in "*?[")


def _is_pattern(path: Path) -> bool:
    """Whether a path is a pattern even where a file has this very name, which it then matches too."""
    return any(_has_wildcard(part) for part in path.parts) and all(matches_itself(part) for part in path.parts)


def _split_glob(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Split ``a/b/*.txt`` into the folder without wildcards and the parts of the pattern below it.

    A part that is not a wildcard's own match, such as ``data[1]``, is a folder's name where there is one.
    """
    parts = path.parts
    first = 0
    while first < len(parts) - 1 and (
        not _has_wildcard(parts[first]) or (not matches_itself(parts[first]) and Path(*parts[: first + 1]).is_dir())
    ):
        first += 1
    return Path(*parts[:first]), parts[first:]


def _hub_source(source: SourceConfig) -> FileSource:
    """Download a dataset of the Hugging Face hub (or take it from the local cache) as arrow files.

    ``datasets`` runs no code from the hub (script datasets are gone since 4.0), and none is allowed here.
    """
    import datasets

    get_logger().info("%s: no such path; loading the Hugging Face dataset of that name", source.source)
    options: dict[str, Any] = {"name": source.name} if source.name else {}
    try:
        dataset = datasets.load_dataset(source.source, split=source.split, **options)
    except Exception as error:  # noqa: BLE001  the hub client raises classes of half a dozen libraries
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source.source}: neither a path nor a Hugging Face dataset that can be loaded ({reason}); "
            "check the source's name and split, and the network"
        ) from None
    if source.text_field not in dataset.column_names:
        raise DataError(
            f"{source.source}: no column {source.text_field!r}, found {dataset.column_names}; set text_field"
        )
    files = tuple(SourceFile(Path(entry["filename"]).name, Path(entry["filename"])) for entry in dataset.cache_files)
    if not files:
        raise DataError(f"{source.source}: split {source.split!r} is empty; choose another split")
    label = ":".join(part for part in (source.source, source.name, source.split) if part)
    return FileSource(label, files, source.text_field, lenient=False)
