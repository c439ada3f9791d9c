"""Whether the disk of a run has room for its next checkpoint, said before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen3next_train.accounting.memory import ADAM_STATE_BYTES
from qwen3next_train.checkpoint.filesystem import format_bytes
from qwen3next_train.config.schema import Config
from qwen3next_train.log import get_logger
from qwen3next_train.parameters import parameter_table


def warn_of_small_disk(config: Config, folder: Path) -> None:
    """Say that a checkpoint will not fit as things are; the run goes on, since there may be space by then.

    Args:
        config: the resolved configuration.
        folder: where checkpoints go; it may not exist yet.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        # The first save says what is wrong with it.
        return
    line = small_disk(config, free)
    if line is not None:
        get_logger().warning("%s: %s", folder, line)


def small_disk(config: Config, free: int) -> str | None:
    """The line about a disk on which one checkpoint of the model does not fit; None where it does.

    Args:
        config: the resolved configuration.
        free: bytes of the disk.
    """
    needed = ADAM_STATE_BYTES * sum(spec.numel for spec in parameter_table(config.model))
    if needed <= free:
        return None
    when = f"the save of step {config.checkpoint.interval}" if config.checkpoint.interval else "the save at the end"
    return (
        f"a checkpoint takes {format_bytes(needed)}, {format_bytes(free)} are free: {when} will fail; "
        "free space or set run.dir to a larger disk"
    )
