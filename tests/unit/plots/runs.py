"""Run directories with rows of our own choosing, for the tests of this package."""

from __future__ import annotations

import json
from pathlib import Path


def write_run(folder: Path, rows: list[dict[str, float | None]], *, first_steps: tuple[int, ...] = (0,)) -> Path:
    """A folder with ``metrics.jsonl`` and ``run.json``; one attempt for each of ``first_steps``."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempts = [{"first_step": step, "logging_interval": 1} for step in first_steps]
    info = {"versions": {"torch": "2.13.0"}, "attempts": attempts, "checkpoint_step": None}
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def row(step: int, **values: float | None) -> dict[str, float | None]:
    """A row of 100 tokens a step; ``_`` in a name stands for the first slash."""
    return {"step": step, "tokens": 100 * step} | {name.replace("_", "/", 1): value for name, value in values.items()}
