"""Names inside a run's checkpoints directory, and what they say. No torch.

* ``step_00001000`` - published;
* ``.replaced-step_00001000-1a2b3c4d`` - published earlier and moved aside while the same step was published
  again. Between those two renames it is the only one of its step, so it counts as a checkpoint too;
* ``.tmp-step_...`` being written, ``.trash-step_...`` being deleted - not checkpoints.

Time stamps and the ``latest`` hint are never consulted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import Filesystem, describe_os_error
from qwen3next_train.errors import StorageError

CHECKPOINTS_NAME = "checkpoints"
"""Of the directory, in a run directory."""

MANIFEST_NAME = "MANIFEST.json"
BEST_NAME = "best"
"""Of the file, beside the checkpoints, that tells people which is the best."""
FORMAT = "qwen3next_train checkpoint"
MANIFEST_START = f'{{\n"format": "{FORMAT}"'.encode()
"""What every version's manifest begins with."""

MAX_STEP = 10**8 - 1

_MAX_LISTED = 20

_PUBLISHED = re.compile(r"step_([0-9]{8})")
_REPLACED = re.compile(r"\.replaced-step_([0-9]{8})-[0-9a-f]{8}")
_UNFINISHED = re.compile(r"\.(?:tmp|trash)-step_[0-9]{8}-[0-9a-f]{8}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A name that may be a checkpoint.

    Args:
        name: in the checkpoints directory.
        step: as the name says.
        published: not one that was moved aside.
    """

    name: str
    step: int
    published: bool


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"step_{step:08d}"


def list_names(fs: Filesystem, directory: Path) -> list[str]:
    """Names in the checkpoints directory, none when it does not exist (yet)."""
    return [] if fs.entry(directory) is None else fs.list_dir(directory)


def list_checkpoints(names: Iterable[str]) -> list[CheckpointInfo]:
    """The checkpoints among directory names, newest step first, a published one before one moved aside."""
    found = []
    for name in names:
        if match := _PUBLISHED.fullmatch(name):
            found.append(CheckpointInfo(name, int(match[1]), published=True))
        elif match := _REPLACED.fullmatch(name):
            found.append(CheckpointInfo(name, int(match[1]), published=False))
    return sorted(found, key=lambda checkpoint: (-checkpoint.step, not checkpoint.published, checkpoint.name))


def directory_of_best(path: Path) -> Path | None:
    """The checkpoints directory whose best one a path names; None where the path names something else.

    Raises:
        StorageError: it cannot be told now.
    """
    if path.name != BEST_NAME:
        return None
    try:
        if path.is_dir() or not path.parent.is_dir():
            return None
        parent = path.parent.resolve()
        inner = parent / CHECKPOINTS_NAME
        return inner if inner.is_dir() else parent
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({describe_os_error(error)}); make it readable") from error


def describe_missing_directory(path: Path, *, alternative: str = "") -> str | None:
    """That a path is no directory, and what to name instead; None where it is one.

    Args:
        path: where checkpoints should be.
        alternative: what else may be named, behind the rest of the sentence.

    Raises:
        OSError: it cannot be told.
    """
    if path.is_dir():
        return None
    return _describe_place(path, "not a directory" if path.exists() else "no such directory", alternative)


def describe_no_checkpoint(path: Path, *, alternative: str = "") -> str:
    """That there is no checkpoint in a directory, and what to name instead (:func:`describe_missing_directory`)."""
    return _describe_place(path, "no checkpoint in it", alternative)


def _describe_place(path: Path, problem: str, alternative: str) -> str:
    return f"{path}: {problem}; name a run directory or one of its checkpoints{alternative}"


def describe_missing_step(directory: Path, step: int, checkpoints: Sequence[CheckpointInfo]) -> str:
    """That a step is not among the checkpoints of a directory, and what to give: those that are, the newest first."""
    problem = f"{directory} has no checkpoint of step {step}"
    steps = [str(checkpoint.step) for checkpoint in checkpoints if checkpoint.published]
    if not steps:
        hint = "it has none at all; leave --resume.from out to start at step 0, or give the path of another run"
        return f"{problem}; {hint}"
    more = f" and {len(steps) - _MAX_LISTED} older ones" if len(steps) > _MAX_LISTED else ""
    return f"{problem}; give a step that it has: {', '.join(steps[:_MAX_LISTED])}{more}"


def is_leftover(name: str) -> bool:
    """Whether a name is one that only an interrupted save or deletion leaves behind."""
    return is_unfinished(name) or _REPLACED.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether a name is that of a checkpoint half written or half deleted; one moved aside may be whole."""
    return _UNFINISHED.fullmatch(name) is not None
