"""Files that are both trained and validated on are said; others are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.seen_text import warn_of_seen_text
from qwen3next_train.data.sources import FileSource, StoreSource, resolve
from tests.unit.data.corpus import write_store


def found(*paths: Path) -> list[FileSource | StoreSource]:
    return [resolve(SourceConfig(source=str(path))) for path in paths]


def test_files_that_training_reads_too_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a", "b", "c"):
        (corpus / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "own.txt").write_text("text of a")
    (tmp_path / "link.txt").symlink_to(corpus / "b.txt")
    os.link(corpus / "c.txt", tmp_path / "hard.txt")
    write_store(tmp_path / "store", [[1] * 50])
    train = found(corpus, tmp_path / "store")
    warn_of_seen_text(train, {"data.validation_sources": [], "data.validation_sets: own": found(tmp_path / "own.txt")})
    assert capsys.readouterr().err == ""
    seen = found(corpus / "[ab]*.txt", tmp_path / "link.txt", tmp_path / "hard.txt", tmp_path / "store.bin")
    warn_of_seen_text(train, {"data.validation_sets: x": seen})
    assert capsys.readouterr().err == "".join(
        f"data.validation_sets: x: {tmp_path}/{source}: training reads {count} of its {count} files, too, such "
        f"as {tmp_path}/{example}: the loss is that of text the model has seen\n"
        for source, count, example in (
            ("corpus/[ab]*.txt", 2, "corpus/a.txt"),
            ("link.txt", 1, "link.txt"),
            ("hard.txt", 1, "hard.txt"),
            ("store.bin", 1, "store.bin"),
        )
    )
