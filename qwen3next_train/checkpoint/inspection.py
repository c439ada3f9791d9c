"""The ``checkpoint`` subcommand: what a run has saved, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qwen3next_train.checkpoint.best import best_of
from qwen3next_train.checkpoint.discovery import VerifyResult, verify
from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, describe_os_error, format_bytes
from qwen3next_train.checkpoint.manifest import Manifest
from qwen3next_train.checkpoint.names import (
    CHECKPOINTS_NAME,
    CheckpointInfo,
    directory_of_best,
    list_checkpoints,
    list_names,
)
from qwen3next_train.errors import ConfigError, ExitCode, StorageError

_HEADINGS = ("step", "size", "written by", "saved at (UTC)", "state")


def checkpoint_command(action: Literal["list", "verify"], run_dir: Path) -> int:
    """Print a run's checkpoints, newest first, one line each.

    ``list`` looks at manifests and file sizes; ``verify`` reads every byte and compares the hashes.

    Args:
        action: which of the two.
        run_dir: of the run; ``RUN/best`` for its best checkpoint alone.

    Returns:
        The exit code: 0, 65 when something is damaged, or 74 when something cannot be read.

    Raises:
        ConfigError: no such run directory.
        StorageError: its checkpoints cannot be listed.
    """
    of_best = directory_of_best(run_dir)
    directory = of_best or run_dir / CHECKPOINTS_NAME
    try:
        if of_best is None and not run_dir.is_dir():
            raise ConfigError(f"checkpoint {action}: {run_dir} is not a directory; give the run.dir of a run")
        found = list_checkpoints(list_names(LOCAL_FILESYSTEM, directory))
    except OSError as error:
        raise StorageError(f"checkpoint {action}: {directory}: {describe_os_error(error)}") from error
    if not found:
        print(f"no checkpoints in {directory}")
        return ExitCode.FINISHED
    best = best_of(LOCAL_FILESYSTEM, directory, found)
    if of_best is not None:
        if best is None:
            raise ConfigError(
                f"checkpoint {action}: {run_dir}: no checkpoint is the best: the run had no checkpoint.best, or no "
                "validation at a saved step; give the run.dir alone"
            )
        found = [best.checkpoint]
    print(_line(_HEADINGS))
    damaged = unreadable = 0
    for checkpoint in found:
        result = verify(LOCAL_FILESYSTEM, directory, checkpoint, hashes=action == "verify")
        damaged += result.reason is not None
        unreadable += result.unreadable
        *cells, state = _row(checkpoint, result, action)
        if best is not None and checkpoint == best.checkpoint:
            state += f", best ({best.metric} {best.value:.4f})"
        print(_line((*cells, state)), flush=True)
    if damaged:
        print(f"{damaged} of {len(found)} checkpoints cannot be used")
        return ExitCode.STORAGE if unreadable else ExitCode.DATA
    return ExitCode.FINISHED


def _row(checkpoint: CheckpointInfo, result: VerifyResult, action: Literal["list", "verify"]) -> tuple[str, ...]:
    state = "verified" if action == "verify" else "complete"
    if result.newer or result.unreadable:
        state = f"unreadable: {result.reason}"
    elif result.reason is not None:
        state = f"damaged: {result.reason}"
    if not checkpoint.published:
        state += f" (moved aside as {checkpoint.name})"
    if result.manifest is None:
        return (str(checkpoint.step), "-", "-", "-", state)
    manifest = result.manifest
    layout = manifest.layout
    ranks = "rank" if layout.world_size == 1 else "ranks"
    written_by = f"{layout.world_size} {ranks}, ep {layout.expert_parallel_size}, {_row_sizes(manifest)}"
    written_by += f"zero {layout.zero_stage}"
    saved_at = manifest.created_at.removesuffix("+00:00").replace("T", " ")
    return (str(checkpoint.step), format_bytes(manifest.num_bytes), written_by, saved_at, state)


def _row_sizes(manifest: Manifest) -> str:
    """How many ranks shared a row, where several did. The manifest's own layout has no place for it."""
    parallel = manifest.config.get("parallel")
    parallel = parallel if isinstance(parallel, dict) else {}
    sizes = {name: parallel.get(f"{key}_parallel_size") for name, key in (("cp", "context"), ("tp", "tensor"))}
    return "".join(f"{name} {size}, " for name, size in sizes.items() if isinstance(size, int) and size > 1)


def _line(cells: tuple[str, ...]) -> str:
    step, size, written_by, saved_at, state = cells
    return f"{step:>8}  {size:>11}  {written_by:<32}  {saved_at:<19}  {state}"
