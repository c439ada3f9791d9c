"""``run.json``: read without trust, since people, other tools and failing disks change files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3next_train.checkpoint.filesystem import Filesystem, UnusableFileError, read_file
from qwen3next_train.checkpoint.names import MAX_STEP
from qwen3next_train.config.metric_names import prefix_of
from qwen3next_train.config.strict_yaml import is_shallow
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.names import WANDB_ID

RUN_INFO_NAME = "run.json"

_MAX_BYTES = 16 << 20


def read_info(fs: Filesystem, path: Path, *, consequence: str = "it is written anew") -> dict[str, Any]:
    """The content of ``run.json``; empty when there is none or it is damaged, which is said.

    Args:
        fs: where it is.
        path: the file.
        consequence: what damage leads to, for the line that says it.

    Returns:
        The fields, of which those below are absent or well-typed: ``wandb_id`` (text that wandb accepts),
        ``attempts`` (list of mappings), ``checkpoint_step`` (step of the newest checkpoint, None before the first).

    Raises:
        OSError: it cannot be read.
    """
    if fs.entry(path) is None:
        return {}
    try:
        info = _parse(read_file(fs, path, max_bytes=_MAX_BYTES))
    except UnusableFileError as error:
        get_logger().warning("%s: %s; %s", path, error, consequence)
        return {}
    except (ValueError, RecursionError) as error:
        get_logger().warning("%s: unreadable (%s); %s", path, " ".join(str(error).split()), consequence)
        return {}
    lost = [key for key, check in _CHECKS.items() if key in info and not check(info[key])]
    if lost:
        get_logger().warning("%s: %s not as this program writes it; %s", path, ", ".join(lost), consequence)
    return {key: value for key, value in info.items() if key not in lost}


def is_run_info(fs: Filesystem, path: Path) -> bool:
    """Whether a file is a ``run.json`` of this program.

    Raises:
        OSError: it cannot be read.
    """
    if fs.entry(path) is None:
        return False
    try:
        info = _parse(read_file(fs, path, max_bytes=_MAX_BYTES))
    except (UnusableFileError, ValueError, RecursionError):
        return False
    return isinstance(info.get("versions"), dict) and isinstance(info.get("attempts"), list)


def due_ranges(attempts: Sequence[Mapping[str, Any]], last_step: int) -> list[range]:
    """The steps up to ``last_step`` that must have been logged, as ascending ranges.

    Args:
        attempts: those of ``run.json`` in order; each one's rows replace the earlier ones' after its first step. Of an
            attempt that does not say at which steps it logged, none is due.
        last_step: of the checkpoint that a run goes on from.
    """
    found: list[range] = []
    for attempt in attempts:
        first, interval = _first_step(attempt), attempt.get("logging_interval")
        found = [_up_to(steps, first) for steps in found]
        if isinstance(interval, int) and _is_step(interval) and interval:
            found.append(range(first - first % interval + interval, MAX_STEP + 1, interval))
    return [steps for steps in (_up_to(steps, last_step) for steps in found) if steps]


class ValidatedRows:
    """Which rows each validation of a run has looked at: losses of other rows do not compare.

    Args:
        attempts: those of ``run.json`` in order; each one's rows of ``metrics.jsonl`` replace the earlier ones' after
            its first step. An attempt of a version that did not record them says nothing of its rows.
    """

    def __init__(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        self._attempts = [(_first_step(attempt), _validation_rows(attempt)) for attempt in attempts]
        self._newest: dict[str, Any] = {}
        for _, rows in self._attempts:
            self._newest.update(rows)

    def compares(self, metric: str, step: int) -> bool:
        """Whether a validation's metric at a step is of the rows that its set had last, as far as anything is known."""
        prefix = prefix_of(metric)
        if prefix not in self._newest:
            return True
        then: Mapping[str, Any] = next((rows for first, rows in reversed(self._attempts) if first < step), {})
        return bool(then.get(prefix) == self._newest[prefix])


def _validation_rows(attempt: Mapping[str, Any]) -> Mapping[str, Any]:
    rows = attempt.get("validation_rows")
    return rows if isinstance(rows, dict) else {}


def _first_step(attempt: Mapping[str, Any]) -> int:
    first = attempt.get("first_step")
    return first if isinstance(first, int) and _is_step(first) else 0


def _up_to(steps: range, last: int) -> range:
    return range(steps.start, min(steps.stop, last + 1), steps.step)


def _parse(raw: bytes) -> dict[str, Any]:
    info = json.loads(raw)
    if not isinstance(info, dict):
        raise ValueError("not a JSON object")
    if not is_shallow(info):
        raise ValueError("nested too deeply")
    return info


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_STEP


_CHECKS = {
    "wandb_id": lambda value: isinstance(value, str) and re.fullmatch(WANDB_ID, value) is not None,
    "attempts": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "checkpoint_step": lambda value: value is None or _is_step(value),
}
