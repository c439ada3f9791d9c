"""The last collectives of every rank, written down when one of them does not come to its end.

torch records them in a ring buffer. NCCL's watchdog writes it to a file of the rank before it aborts a process that has
waited for too long; a rank that learns of a lost peer by an exception writes its own here. ``python -m
torch.distributed.flight_recorder.fr_trace RUN --prefix flight_recorder_rank_`` compares the files of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3next_train.log import get_logger

FILE_PREFIX = "flight_recorder_rank_"

_NUM_COLLECTIVES = 2000
"""torch's own default since 2.11; written out for what an environment may have switched off."""


@contextmanager
def recorded_collectives(run_dir: Path, rank: int) -> Iterator[None]:
    """Let torch record, and write to the run directory; to be entered before there is a process group.

    What the environment says about it stays as it is. Rank 0 removes the files of earlier attempts.
    """
    defaults = {
        "TORCH_FR_DUMP_TEMP_FILE": (str(run_dir / FILE_PREFIX), "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        "TORCH_FR_BUFFER_SIZE": (str(_NUM_COLLECTIVES), "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": ("1", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    }
    added = {
        name: value for name, (value, older) in defaults.items() if name not in os.environ and older not in os.environ
    }
    try:
        for path in run_dir.glob(f"{FILE_PREFIX}*") if rank == 0 else ():
            path.unlink(missing_ok=True)
    except OSError as error:
        get_logger().warning("%s: cannot be removed (%s)", error.filename, error.strerror)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def dump_path(run_dir: Path, rank: int) -> Path:
    """Where the collectives of a rank are written."""
    return run_dir / f"{FILE_PREFIX}{rank}"


def write_collectives(run_dir: Path, rank: int) -> Path | None:
    """Write this process's last collectives, unless the watchdog has done so.

    Returns:
        The file; None where nothing was recorded or it cannot be written.
    """
    import torch
    import torch._C._distributed_c10d as c10d

    path = dump_path(run_dir, rank)
    # NCCL has a recorder of its own; the other one has what gloo did.
    dump = vars(c10d).get("_dump_nccl_trace" if torch.cuda.is_initialized() else "_dump_fr_trace")
    try:
        if dump is not None and not path.exists():
            path.write_bytes(dump())
        return path if path.exists() else None
    except (OSError, RuntimeError):
        # There is already something to report.
        return None


def written_dumps(run_dir: Path) -> str:
    """What an error line says of the files there are; empty for none."""
    try:
        found = list(run_dir.glob(f"{FILE_PREFIX}*"))
    except OSError:
        return ""
    ranks = "1 rank" if len(found) == 1 else f"{len(found)} ranks"
    return f"; last collectives of {ranks}: {run_dir / FILE_PREFIX}*" if found else ""
