"""Where a run starts: its newest checkpoint or the one asked for, unless history or configuration speak against it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen3next_train.checkpoint.manager import CheckpointManager, VerifiedCheckpoint
from qwen3next_train.checkpoint.train_state import AcceptedChange, TrainState
from qwen3next_train.checkpoint.weights import name_checkpoint
from qwen3next_train.config.curve import CURVE_KEYS
from qwen3next_train.config.describe import Change, flatten
from qwen3next_train.config.error_lines import show_stored
from qwen3next_train.config.schema import Config, DataConfig
from qwen3next_train.data.position import DataStart, change_start, content_of, is_same_stream, new_start
from qwen3next_train.data.prepared import PreparedData
from qwen3next_train.engine.base import FRAGMENT_KINDS
from qwen3next_train.errors import CheckpointError, ConfigError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.wandb_settings import new_run_id
from qwen3next_train.optim.schedule import Rewarmup, learning_rate
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.train.initial_weights import InitialWeights, find_initial_weights
from qwen3next_train.train.resume import ACCEPT, FROM, NEWEST, DataChange, Resume, accepted_changes
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.run_info import due_ranges
from qwen3next_train.train.start import find_start


@dataclass(frozen=True)
class Restored:
    """Where a run starts.

    Args:
        state: progress of the checkpoint, or of a new run, with what this start changes.
        found: the checkpoint, None for a new run.
        initial: weights a new run starts from, None for random ones.
        changes: what this start changes.
        start: as ``Resume.start``, where the attempt does start there.
    """

    state: TrainState
    found: VerifiedCheckpoint | None
    initial: InitialWeights | None
    changes: tuple[AcceptedChange, ...] = ()
    start: int | Path | None = None

    @property
    def data(self) -> DataStart:
        """Where each source of the blend goes on."""
        return DataStart(self.state.sources, self.state.former_sources)


def restore_state(
    config: Config,
    checkpoints: CheckpointManager,
    prepared: PreparedData,
    run_dir: RunDirectory,
    control: ControlGroup,
    resume: Resume = NEWEST,
) -> Restored:
    """Find progress and weights to go on from. Collective.

    Args:
        config: the resolved configuration.
        checkpoints: those of the run directory.
        prepared: the data.
        run_dir: the opened run directory.
        control: the ranks.
        resume: which checkpoint, and what may differ from it.

    Raises:
        ConfigError: the directory belongs to another configuration, or has done more than ``run.steps``; or there is no
            such checkpoint.
        DataError: the data is not what the run started with.
        CheckpointError: no checkpoint is intact, or all were deleted.
        StorageError: a checkpoint or another file of the directory cannot be read.
    """
    info = run_dir.read_info()
    newest = checkpoints.newest_step()
    start = find_start(resume, config, run_dir, control, newest)
    target = start if isinstance(start, int) else newest
    if target is not None and target > config.run.steps:
        raise ConfigError(
            f"run.steps: {config.run.steps} are fewer than the {target} steps that run.dir has done already "
            f"({run_dir.checkpoints_path}); give {target} or more, or choose another run.dir"
        )
    recorded = run_dir.read_config()
    if isinstance(start, int):
        found: VerifiedCheckpoint | None = checkpoints.find_step(start)
    elif isinstance(start, Path):
        _reject_lost_checkpoints(run_dir, info, recorded)
        found = _of_another_run(start, config, resume, prepared, control)
    else:
        # Before a terabyte is verified for nothing.
        if (glance := checkpoints.glance()) is not None:
            _go_on(glance.config, glance.state, config, resume, prepared, run_dir.path)
        found = checkpoints.find_latest()
    if found is None:
        changes: list[Change] = []
        if recorded is not None:
            changes = accepted_changes(recorded, config, resume, None, step=0, place=run_dir.path)
        _reject_lost_checkpoints(run_dir, info, recorded)
        _say_unused(resume, changes)
        state = _new_state(config, prepared, _wandb_id(info, control), _as_accepted(changes, 0))
        return Restored(state, None, find_initial_weights(config, control), state.changes)
    if start is None and (info.get("checkpoint_step") or 0) > found.step:
        get_logger().warning(
            "run.dir: the checkpoint of step %d is gone or damaged; the run goes on from step %d and does the steps "
            "between again",
            info["checkpoint_step"],
            found.step,
        )
    manifest = found.manifest
    place = found.path if isinstance(start, Path) else run_dir.path
    state, changes, lines = _go_on(manifest.config, manifest.train_state, config, resume, prepared, place)
    if isinstance(start, Path):
        state = replace(state, wandb_id=_wandb_id(info, control), lowest=None)
    for change in changes:
        get_logger().info(
            "%s was %s, now %s, from step %d on",
            change.key,
            show_stored(change.old),
            show_stored(change.new),
            found.step,
        )
    for line in lines:
        get_logger().info("data: %s", line)
    _say_unused(resume, changes)
    return Restored(state, found, None, _as_accepted(changes, found.step), start)


def _of_another_run(
    path: Path, config: Config, resume: Resume, prepared: PreparedData, control: ControlGroup
) -> VerifiedCheckpoint:
    with _said_of_from():
        named = name_checkpoint(path, control)
        glance = named.glance()
    # Before a terabyte is verified for nothing.
    if glance is not None:
        _require_gone_on_from(glance.path, glance.kinds, glance.state.step, config)
        _go_on(glance.config, glance.state, config, resume, prepared, glance.path)
    with _said_of_from():
        found = named.verify()
    _require_gone_on_from(found.path, found.manifest.kinds, found.step, config)
    return found


@contextmanager
def _said_of_from() -> Iterator[None]:
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{FROM}: {error}") from error


def _require_gone_on_from(path: Path, kinds: Iterable[str], step: int, config: Config) -> None:
    if set(kinds) != set(FRAGMENT_KINDS):
        raise ConfigError(
            f"{FROM}: {path} has weights but no optimizer state; start from the weights alone by --checkpoint.init_from"
        )
    if step > config.run.steps:
        raise ConfigError(
            f"run.steps: {config.run.steps} are fewer than the {step} steps of {path}; give more, or start from its "
            "weights alone by --checkpoint.init_from"
        )


def _wandb_id(info: Mapping[str, Any], control: ControlGroup) -> str:
    wandb_id: str = control.broadcast_json(info.get("wandb_id") or new_run_id(os.environ))
    return wandb_id


def _new_state(
    config: Config, prepared: PreparedData, wandb_id: str, changes: tuple[AcceptedChange, ...]
) -> TrainState:
    return TrainState(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        flops_total=0,
        skipped_steps=0,
        optimizer_step=0,
        data_fingerprint=prepared.fingerprint,
        wandb_id=wandb_id,
        sources=new_start(prepared, sequence_length=config.data.sequence_length, seed=config.run.seed).sources,
        changes=changes,
    )


def _go_on(
    recorded: Mapping[str, Any],
    state: TrainState,
    config: Config,
    resume: Resume,
    prepared: PreparedData,
    place: Path,
) -> tuple[TrainState, list[Change], Sequence[str]]:
    """The state of a checkpoint as ``config`` goes on with it, what changes, and what that does to the data.

    Raises:
        ConfigError: see :func:`accepted_changes`; or a re-warm-up would outlast the run.
        DataError: see :func:`accepted_changes`.
        CheckpointError: the checkpoint says nothing usable of its data or learning rate.
    """
    before, weights = _data_before(recorded, state, prepared, place)
    contents = {content_of(source) for source in prepared.train}
    known = {source.content for source in (*before.sources, *before.former)}
    data = DataChange(
        same_stream=is_same_stream(before.sources, weights, prepared, config),
        all_known=contents <= known,
        some_known=bool(contents & known) or not prepared.train,
        old=state.data_fingerprint,
        new=prepared.fingerprint,
    )
    changes = accepted_changes(recorded, config, resume, data, step=state.step, place=place)
    start, consumed = before, state.consumed_samples
    if not data.same_stream:
        start, consumed = change_start(before, weights, consumed, prepared, config), 0
    state = replace(
        state,
        consumed_samples=consumed,
        sources=start.sources,
        former_sources=start.former,
        data_fingerprint=prepared.fingerprint,
        changes=(*state.changes, *_as_accepted(changes, state.step)),
        rewarmup=_rewarmup(recorded, state, config, place) if changes else state.rewarmup,
        # Where training text changes, so may what is held out of it.
        lowest=state.lowest if data.same_stream else None,
    )
    return state, changes, start.lines


def _data_before(
    recorded: Mapping[str, Any], state: TrainState, prepared: PreparedData, place: Path
) -> tuple[DataStart, list[float]]:
    """Where the checkpoint's blend began, and the weights of its sources."""
    run = recorded.get("run")
    seed = run.get("seed", Config().run.seed) if isinstance(run, dict) else None
    try:
        data = DataConfig.model_validate(recorded.get("data"))
    except ValidationError as error:
        raise CheckpointError(f"{place}: data: the checkpoint's configuration is not one of this program") from error
    weights = [source.weight for source in data.sources]
    if state.sources:
        if len(state.sources) != len(weights):
            raise CheckpointError(
                f"{place}: {len(state.sources)} positions for {len(weights)} sources in the checkpoint"
            )
        return DataStart(state.sources, state.former_sources), weights
    # Written by a version that kept one integer only: nothing had changed, and which sources they were shows in the
    # digest of them all.
    if len(prepared.train) == len(weights) and isinstance(seed, int):
        train = [replace(source, weight=weight) for source, weight in zip(prepared.train, weights, strict=True)]
        if replace(prepared, train=tuple(train)).fingerprint == state.data_fingerprint:
            return new_start(prepared, sequence_length=data.sequence_length, seed=seed), weights
    return DataStart(()), weights


def _rewarmup(recorded: Mapping[str, Any], state: TrainState, config: Config, place: Path) -> Rewarmup | None:
    """The return to the schedule that begins behind ``state.step``; the one before goes on where none is asked for."""
    steps, last = config.schedule.rewarmup_steps, config.run.steps
    if not steps:
        return state.rewarmup
    if state.step + steps > last:
        raise ConfigError(
            f"schedule.rewarmup_steps: {steps} steps from step {state.step} on end behind run.steps {last}; give "
            f"{last - state.step} or fewer"
        )
    rate = 0.0
    if config.schedule.rewarmup_from == "current":
        rate = learning_rate(_schedule_of(recorded, place), state.step, state.rewarmup)
    return Rewarmup(after_step=state.step, from_lr=rate, steps=steps)


def _schedule_of(recorded: Mapping[str, Any], place: Path) -> Config:
    """The checkpoint's configuration as far as the learning rate depends on it."""
    flat = flatten(recorded)
    tree: dict[str, dict[str, Any]] = {}
    for key in CURVE_KEYS:
        if key in flat:
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = flat[key]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(
            f"{place}: schedule: the checkpoint's configuration is not one of this program"
        ) from error


def _as_accepted(changes: Sequence[Change], step: int) -> tuple[AcceptedChange, ...]:
    return tuple(AcceptedChange(key=each.key, old=each.old, new=each.new, step=step) for each in changes)


def _say_unused(resume: Resume, changes: Sequence[Change]) -> None:
    changed = {change.key for change in changes}
    unused = [key for key in resume.accept if key not in changed]
    if unused:
        get_logger().info("%s: nothing to accept of %s", ACCEPT, ", ".join(unused))


def _reject_lost_checkpoints(
    run_dir: RunDirectory, info: Mapping[str, Any], recorded: Mapping[str, Any] | None
) -> None:
    """Raise when the directory has no checkpoint although there was one: starting over would overwrite its history.

    A run that was killed before its first checkpoint starts over. ``run.json`` tells them apart; where it does not, a
    row behind the first interval does.
    """
    logged = run_dir.last_logged_step()
    saved = info.get("checkpoint_step")
    if saved is None:
        if "checkpoint_step" in info or recorded is None:
            return
        section = recorded["checkpoint"]
        interval = section.get("interval") if isinstance(section, dict) else None
        if not isinstance(interval, int) or not 0 < interval < logged:
            return
        saved = logged - 1 - (logged - 1) % interval
    raise CheckpointError(
        f"run.dir: {run_dir.checkpoints_path} has no checkpoint, but one of step {saved} was saved and metrics.jsonl "
        f"has rows up to step {logged}; restore the checkpoints, or choose another run.dir to start over"
    )


def due_steps(info: Mapping[str, Any], restored: Restored) -> list[range]:
    """The steps that ``metrics.jsonl`` must have rows of."""
    attempts = info.get("attempts", [])
    if not attempts and restored.found is not None and not isinstance(restored.start, Path):
        # Of the attempt that saved the checkpoint its configuration says at least the last step it logged.
        step, section = restored.found.step, restored.found.manifest.config.get("logging")
        interval = section.get("interval") if isinstance(section, dict) else None
        if isinstance(interval, int) and interval > 0:
            attempts = [{"first_step": max(step - interval, 0), "logging_interval": interval}]
    return due_ranges(attempts, restored.state.step)
