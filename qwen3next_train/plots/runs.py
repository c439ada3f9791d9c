"""What a run has logged, as columns of numbers. Nothing of the run is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.metrics.history import Row, read_rows
from qwen3next_train.train.run_info import RUN_INFO_NAME, read_info

METRICS_NAME = "metrics.jsonl"

Axis = Literal["steps", "tokens"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LoggedRun:
    """The rows of one run.

    Letters: R rows.

    Args:
        name: what tells it from the other runs of a plot.
        folder: where its files are.
        steps: ``[R]``, ascending.
        tokens: ``[R]``, consumed up to each row.
        values: ``[R]`` by metric; NaN where a row lacks it or it was not finite.
        info: ``run.json``; empty where there is none.
        resumed_at: steps from which later attempts went on, ascending; those whose rows are still there.
    """

    name: str
    folder: Path
    steps: Floats
    tokens: Floats
    values: Mapping[str, Floats]
    info: Mapping[str, Any]
    resumed_at: tuple[int, ...]

    def along(self, axis: Axis) -> Floats:
        """Where each row stands on the horizontal axis."""
        return self.steps if axis == "steps" else self.tokens

    def resumes_along(self, axis: Axis) -> list[float]:
        """Where the resumes stand on it; those before the first row or after the last are left out."""
        at = [step for step in self.resumed_at if self.steps[0] <= step <= self.steps[-1]]
        return [float(place) for place in np.interp(at, self.steps, self.along(axis))] if at else []


def read_runs(paths: Sequence[Path]) -> list[LoggedRun]:
    """Read runs, each named by its folder, or by its path where two folders have the same name.

    Args:
        paths: run directories, or their ``metrics.jsonl``.

    Raises:
        ConfigError: there is no such run, or it has logged nothing yet.
        DataError: a row is damaged.
        StorageError: something cannot be read.
    """
    files = [_metrics_file(path) for path in paths]
    names = [file.parent.absolute().name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.parent) for file in files]
    return [_read_run(file, name) for file, name in zip(files, names, strict=True)]


def _metrics_file(path: Path) -> Path:
    if path.is_dir():
        file = path / METRICS_NAME
        if not file.exists():
            raise ConfigError(f"{path}: has no {METRICS_NAME}; give the run.dir of a run that has logged a step")
        return file
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; give the run.dir of a run, or its {METRICS_NAME}")
    return path


def _read_run(file: Path, name: str) -> LoggedRun:
    try:
        rows = read_rows(file)
        info = read_info(LOCAL_FILESYSTEM, file.parent / RUN_INFO_NAME, consequence="resumes are not shown")
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({system_reason(error)}); make it readable") from error
    if not rows:
        raise ConfigError(f"{file}: has no row yet; wait until the run has logged a step")
    metrics = dict.fromkeys(metric for row in rows for metric in row if metric not in ("step", "tokens"))
    return LoggedRun(
        name=name,
        folder=file.parent,
        steps=_column(rows, "step"),
        tokens=_column(rows, "tokens"),
        values={metric: _column(rows, metric) for metric in metrics},
        info=info,
        resumed_at=_resumes(info.get("attempts", [])),
    )


def _column(rows: Sequence[Row], metric: str) -> Floats:
    values = (row.get(metric) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _resumes(attempts: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """First steps of the attempts after the first, less those that a later attempt went back behind."""
    found: list[int] = []
    for attempt in attempts[1:]:
        step = attempt.get("first_step")
        if isinstance(step, int):
            found = [earlier for earlier in found if earlier < step] + ([step] if step > 0 else [])
    return tuple(found)
