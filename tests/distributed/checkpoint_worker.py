"""One of two ranks that save and look for checkpoints, with a fault on rank 1 alone.

:func:`main` writes ``rank_<r>.json``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen3next_train.errors import StorageError
from qwen3next_train.parallel.control import GlooControlGroup
from tests.unit.checkpoint.support import FailingFilesystem, HookedFilesystem, manager, save

WORLD_SIZE = 2


def one_rank_fails(directory: Path, control: GlooControlGroup) -> dict[str, object]:
    """Steps 1 and 2 are saved; rank 1 has no room at step 3, cannot read step 2, and then has a damaged file there."""
    for step in (1, 2):
        save(manager(directory, control=control), step, rank=control.rank, world_size=WORLD_SIZE)
    full = FailingFilesystem(0, errno.ENOSPC, once=False, only=("write",))
    filesystem = full if control.rank == 1 else HookedFilesystem()
    error = ""
    try:
        save(manager(directory, control=control, filesystem=filesystem), 3, rank=control.rank, world_size=WORLD_SIZE)
    except StorageError as caught:
        error = str(caught)
    found = manager(directory, control=control).find_latest()
    broken = HookedFilesystem(_refuse_step_2) if control.rank == 1 else HookedFilesystem()
    error_when_broken = ""
    try:
        manager(directory, control=control, filesystem=broken).find_latest()
    except StorageError as caught:
        error_when_broken = str(caught)
    if control.rank == 1:
        file = directory / "step_00000002" / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    control.all_true(True)
    found_when_damaged = manager(directory, control=control).find_latest()
    return {
        "error": error,
        "names": sorted(path.name for path in directory.iterdir()),
        "found": found.step if found else None,
        "error_when_broken": error_when_broken,
        "found_when_damaged": found_when_damaged.step if found_when_damaged else None,
    }


def one_rank_is_killed(directory: Path, control: GlooControlGroup) -> dict[str, object]:
    """Step 1 is saved; rank 1 is gone in the middle of writing its file of step 2."""
    save(manager(directory, control=control), 1, rank=control.rank, world_size=WORLD_SIZE)
    filesystem = HookedFilesystem(_die_while_writing) if control.rank == 1 else HookedFilesystem()
    try:
        save(manager(directory, control=control, filesystem=filesystem), 2, rank=control.rank, world_size=WORLD_SIZE)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def _refuse_step_2(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "open" and arguments[0].parent.name == "step_00000002":
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))


def _die_while_writing(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "write":
        os.write(arguments[0], bytes(arguments[1])[:10])
        os.kill(os.getpid(), signal.SIGKILL)


def main(scenario: str, rank: int, folder: Path) -> None:
    """Join the other rank and play the scenario."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    assert dist.group.WORLD is not None
    act = {"fails": one_rank_fails, "killed": one_rank_is_killed}[scenario]
    control = GlooControlGroup(dist.group.WORLD)
    (folder / f"rank_{rank}.json").write_text(json.dumps(act(folder / "checkpoints", control)))
    if scenario == "fails":
        control.all_true(True)
        dist.destroy_process_group()
    # Without the interpreter's teardown, in which gloo's threads now and then abort the process.
    os._exit(0)
