from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data import store_builder
from qwen3next_train.data.progress import Progress
from qwen3next_train.data.sources import FileSource, resolve
from qwen3next_train.data.store_builder import build_stores
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer


@pytest.mark.parametrize(
    ("total", "start", "num_bytes", "elapsed_s", "state"),
    [
        (100_000_000, 0, 25_000_000, 10.0, "25 %, 1,234 tokens, 7.5 MB/s, 0:00:30 left"),
        # Only what this call has done counts for the rate.
        (100_000_000, 20_000_000, 25_000_000, 10.0, "25 %, 1,234 tokens, 1.5 MB/s, 0:02:30 left"),
        (100_000_000, 25_000_000, 25_000_000, 10.0, "25 %, 1,234 tokens"),
        # The files have grown since they were looked at.
        (1_000_000, 0, 2_000_000, 1.0, "100 %, 1,234 tokens, 6.0 MB/s, 0:00:00 left"),
        (0, 0, 0, 0.0, "0 %, 1,234 tokens"),
    ],
)
def test_state(total: int, start: int, num_bytes: int, elapsed_s: float, state: str) -> None:
    assert Progress("x", total, start).state(1234, num_bytes, 3 * (num_bytes - start), elapsed_s) == state


def test_every_source_counts_its_own_tokens_and_the_bytes_of_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[tuple[int, ...]] = []
    monkeypatch.setattr(Progress, "update", lambda self, *totals: updates.append(totals))
    monkeypatch.setattr(store_builder, "GROUP_CHARS", 1)
    for label in ("first", "second"):
        folder = tmp_path / label
        folder.mkdir()
        for name in ("a", "b"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": "x"}) + "\n" for _ in range(3)))
        source = resolve(SourceConfig(source=str(folder)))
        assert isinstance(source, FileSource)
        updates.clear()
        build_stores(
            source,
            Tokenizer(BUILTIN),
            train_prefix=folder / "train",
            validation_prefix=folder / "validation",
            held_out_fraction=0.0,
            skipped={},
        )
        line = len('{"text": "x"}\n')
        assert updates == [(2 * number, line * number, number) for number in range(1, 7)]
