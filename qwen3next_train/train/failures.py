"""Exceptions of libraries and the system that say something about the machine, as the program's own errors."""

from __future__ import annotations

import re

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import OutOfMemory, StorageError, TrainError
from qwen3next_train.exhaustion import is_out_of_files, is_out_of_memory, open_files_hint
from qwen3next_train.train.memory_check import settings_that_help

_OF_DEVICE = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|GPU", re.IGNORECASE)
_AMOUNT = re.compile(r"[Tt]ried to allocate (\S+ [KMGTP]?i?B|\d+ bytes)|you tried to allocate (\d+ bytes)")


def foreseen(error: BaseException, config: Config | None = None) -> TrainError | None:
    """The error of ours that an exception stands for: something is used up, a file or pipe failed; None for a bug.

    Args:
        error: what was raised.
        config: what was to be trained; None where nothing was.
    """
    if is_out_of_memory(error):
        text = " ".join(str(error).split())
        on_device = _OF_DEVICE.search(f"{type(error).__name__} {text}") is not None
        amount = _AMOUNT.search(text)
        tried = f" (tried to allocate {amount[1] or amount[2]})" if amount else ""
        where = "GPU" if on_device else "host"
        return OutOfMemory(f"out of memory on the {where}{tried}; {settings_that_help(config, on_device=on_device)}")
    if is_out_of_files(error):
        return StorageError(f"{_place(error)}: too many open files; {open_files_hint()}")
    if isinstance(error, OSError):
        return StorageError(_storage_line(error))
    return None


def _storage_line(error: OSError) -> str:
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    if "No usable temporary directory" in reason:
        return f"TMPDIR: {reason[0].lower()}{reason[1:]}; set it to a folder that can be written"
    return f"{_place(error)}: {reason} ({type(error).__name__}); free space, fix permissions or choose another place"


def _place(error: BaseException) -> str:
    names = (error.filename, error.filename2) if isinstance(error, OSError) else ()
    # A descriptor's number says nothing to anyone.
    return ", ".join(str(name) for name in names if name is not None and not isinstance(name, int)) or "input/output"
