"""Where a run starts: its newest checkpoint, unless the directory's history or configuration speaks against it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3next_train.checkpoint.manager import CheckpointManager, VerifiedCheckpoint
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.error_lines import show_stored
from qwen3next_train.config.schema import Config
from qwen3next_train.data.prepared import PreparedData
from qwen3next_train.errors import CheckpointError, ConfigError, DataError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.wandb_settings import new_run_id
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.train.initial_weights import InitialWeights, find_initial_weights
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.train.run_info import due_ranges


@dataclass(frozen=True)
class Restored:
    """Where a run starts.

    Args:
        state: progress of the checkpoint, or of a new run.
        found: the checkpoint, None for a new run.
        initial: weights a new run starts from, None for random ones.
    """

    state: TrainState
    found: VerifiedCheckpoint | None
    initial: InitialWeights | None


def restore_state(
    config: Config,
    checkpoints: CheckpointManager,
    prepared: PreparedData,
    run_dir: RunDirectory,
    control: ControlGroup,
) -> Restored:
    """Find progress and weights to go on from. Collective.

    Args:
        config: the resolved configuration.
        checkpoints: those of the run directory.
        prepared: the data.
        run_dir: the opened run directory.
        control: the ranks.

    Raises:
        ConfigError: the directory belongs to another configuration, or has done more than ``run.steps``.
        DataError: the data is not what the run started with.
        CheckpointError: no checkpoint is intact, or all were deleted.
        StorageError: a checkpoint or another file of the directory cannot be read.
    """
    # Before a terabyte is verified for nothing, as if there were a checkpoint of the first step; what depends on the
    # step is looked at again below.
    newest = checkpoints.newest_step()
    if newest is not None and newest > config.run.steps:
        raise ConfigError(
            f"run.steps: {config.run.steps} are fewer than the {newest} steps that run.dir has done already "
            f"({run_dir.checkpoints_path}); give {newest} or more, or choose another run.dir"
        )
    recorded = run_dir.read_config()
    if recorded is not None:
        _check_same_configuration(run_dir, recorded, config, step=1)
    found = checkpoints.find_latest()
    info = run_dir.read_info()
    if found is None:
        if recorded is not None:
            _check_same_configuration(run_dir, recorded, config, step=0)
        _reject_lost_checkpoints(run_dir, info, recorded)
        wandb_id: str = control.broadcast_json(info.get("wandb_id") or new_run_id(os.environ))
        new = TrainState(
            step=0,
            consumed_samples=0,
            consumed_tokens=0,
            flops_total=0,
            skipped_steps=0,
            optimizer_step=0,
            data_fingerprint=prepared.fingerprint,
            wandb_id=wandb_id,
        )
        return Restored(new, None, find_initial_weights(config, control))
    state = found.manifest.train_state
    if (info.get("checkpoint_step") or 0) > found.step:
        get_logger().warning(
            "run.dir: the checkpoint of step %d is gone or damaged; the run goes on from step %d and does the steps "
            "between again",
            info["checkpoint_step"],
            found.step,
        )
    _check_same_configuration(run_dir, found.manifest.config, config, step=found.step)
    if state.data_fingerprint != prepared.fingerprint:
        labels = ", ".join(source.label for source in prepared.train[:3])
        more = f" and {len(prepared.train) - 3} more" if len(prepared.train) > 3 else ""
        raise DataError(
            f"run.dir: {found.path}: the training data ({labels}{more}) is not what the run started with; "
            "restore the data or choose another run.dir"
        )
    return Restored(state, found, None)


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


def _check_same_configuration(run_dir: RunDirectory, recorded: Mapping[str, Any], config: Config, *, step: int) -> None:
    """Raise when ``config`` would not continue the curve that ``recorded`` has begun in the directory."""
    changes = compare_configs(recorded, config, step=step)
    decisive = [*changes.shape, *changes.trajectory]
    if decisive:
        listed = ", ".join(
            f"{change.key} was {show_stored(change.old)}, now {show_stored(change.new)}" for change in decisive[:3]
        )
        more = f", and {len(decisive) - 3} more" if len(decisive) > 3 else ""
        raise ConfigError(
            f"run.dir: {run_dir.path} belongs to another configuration ({listed}{more}); "
            "go on with that configuration or choose another run.dir"
        )


def due_steps(info: Mapping[str, Any], restored: Restored) -> list[range]:
    """The steps that ``metrics.jsonl`` must have rows of."""
    attempts = info.get("attempts", [])
    if not attempts and restored.found is not None:
        # Of the attempt that saved the checkpoint its configuration says at least the last step it logged.
        step, section = restored.found.step, restored.found.manifest.config.get("logging")
        interval = section.get("interval") if isinstance(section, dict) else None
        if isinstance(interval, int) and interval > 0:
            attempts = [{"first_step": max(step - interval, 0), "logging_interval": interval}]
    return due_ranges(attempts, restored.state.step)
