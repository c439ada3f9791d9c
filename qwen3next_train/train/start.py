"""Where an attempt is told to start (``--resume.from``), against what lies in and outside ``run.dir``. No torch.

The same line is run again after every stop, so an option that an earlier attempt has acted on asks for nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, describe_os_error
from qwen3next_train.checkpoint.names import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    CheckpointInfo,
    describe_missing_directory,
    describe_missing_step,
    describe_no_checkpoint,
    directory_of_best,
    list_checkpoints,
    list_names,
)
from qwen3next_train.config.describe import config_hash
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.train.resume import FROM, Resume
from qwen3next_train.train.run_info import RUN_INFO_NAME, read_info

if TYPE_CHECKING:
    from qwen3next_train.parallel.control import ControlGroup
    from qwen3next_train.train.run_directory import RunDirectory


def require_start(resume: Resume, config: Config) -> None:
    """Reject a start at a checkpoint that is not there, before anything is prepared; nothing is verified.

    Args:
        resume: the options.
        config: the resolved configuration.

    Raises:
        ConfigError: there is no such checkpoint, and no earlier attempt has started from it.
        StorageError: a directory or ``run.json`` cannot be read.
    """
    if resume.start is None:
        return
    run_dir = Path(config.run.dir)
    directory = run_dir / CHECKPOINTS_NAME
    start = _without_place(resume.start, directory)
    try:
        known = _checkpoints_in(directory)
        problem = (
            _problem_of_step(start, directory, known) if isinstance(start, int) else _problem_of_path(start, known)
        )
        if problem is None:
            return
        info = read_info(LOCAL_FILESYSTEM, run_dir / RUN_INFO_NAME)
    except OSError as error:
        raise StorageError(f"{FROM}: {start}: cannot be read ({describe_os_error(error)}); make it readable") from error
    acted = is_repeated(info, start, config) if isinstance(start, int) else bool(known) and _has_forked(info, start)
    if not acted:
        raise ConfigError(f"{FROM}: {problem}")


def find_start(
    resume: Resume, config: Config, run_dir: RunDirectory, control: ControlGroup, newest: int | None
) -> int | Path | None:
    """Where this attempt has to start; None for the newest checkpoint. Collective.

    Args:
        resume: the options, which :func:`require_start` has let pass.
        config: the resolved configuration.
        run_dir: the opened run directory.
        control: the ranks.
        newest: step of its newest checkpoint, None without one.

    Raises:
        ConfigError: the best of ``run.dir`` is asked for.
        StorageError: ``run.json`` cannot be read.
    """
    start = resume.start if resume.start is None else _without_place(resume.start, run_dir.checkpoints_path)
    if isinstance(start, Path) and newest is not None:
        get_logger().info("%s is not read: run.dir has a checkpoint", FROM)
        return None
    if isinstance(start, int) and control.broadcast_json(is_repeated(run_dir.read_info(), start, config)):
        get_logger().info(
            "%s %d: an earlier attempt with this configuration went back there; it is gone on with", FROM, start
        )
        return None
    return start


def is_repeated(info: Mapping[str, Any], step: int, config: Config) -> bool:
    """Whether the newest attempt that went back went to ``step``, with the same configuration."""
    asked = [attempt["resume_from"] for attempt in info.get("attempts", []) if "resume_from" in attempt]
    return bool(asked) and asked[-1] == start_record(step, config)


def start_record(start: int | Path, config: Config) -> dict[str, Any]:
    """What ``run.json`` says of an attempt that started at ``Resume.start``."""
    place: dict[str, Any] = {"step": start} if isinstance(start, int) else {"path": str(start)}
    return place | {"config_sha256": config_hash(config), "rewarmup_steps": config.schedule.rewarmup_steps}


def _has_forked(info: Mapping[str, Any], start: Path) -> bool:
    """Whether an attempt of the run began with a checkpoint of this place, which is not needed any more then."""
    asked = [attempt.get("resume_from") for attempt in info.get("attempts", [])]
    return any(isinstance(each, dict) and each.get("path") == str(start) for each in asked)


def _without_place(start: int | Path, directory: Path) -> int | Path:
    """The step of a checkpoint of ``run.dir`` that is named by its path; anything else as it is."""
    if isinstance(start, int):
        return start
    if directory_of_best(start) == directory.resolve():
        raise ConfigError(
            f"{FROM}: {start}: the best of run.dir may be another checkpoint at the next start; give its step, which "
            "`checkpoint list` marks"
        )
    place = start.absolute()
    if place.parent.resolve() == directory.resolve() and place.name.startswith("step_"):
        number = place.name.removeprefix("step_")
        return int(number) if number.isascii() and number.isdigit() else start
    return start


def _checkpoints_in(directory: Path) -> list[CheckpointInfo]:
    return list_checkpoints(list_names(LOCAL_FILESYSTEM, directory))


def _problem_of_step(step: int, directory: Path, known: list[CheckpointInfo]) -> str | None:
    if any(checkpoint.step == step for checkpoint in known):
        return None
    return describe_missing_step(directory, step, known)


def _problem_of_path(path: Path, known: list[CheckpointInfo]) -> str | None:
    """Why there is no checkpoint at a path; None where there may be one."""
    steps = [str(checkpoint.step) for checkpoint in known if checkpoint.published]
    own = f", or a step of run.dir: {', '.join(steps)}" if steps else ""
    if directory_of_best(path) is not None:
        return None
    if (problem := describe_missing_directory(path, alternative=own)) is not None:
        return problem
    inner = path / CHECKPOINTS_NAME
    if (path / MANIFEST_NAME).exists() or _checkpoints_in(inner if inner.is_dir() else path):
        return None
    return describe_no_checkpoint(path, alternative=own)
