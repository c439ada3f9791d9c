"""Exceptions of libraries and the system that say something about the machine, as the program's own errors."""

from __future__ import annotations

import os
import re
import traceback

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, OutOfMemory, StorageError, TrainError
from qwen3next_train.exhaustion import (
    is_out_of_files,
    is_out_of_memory,
    is_out_of_threads,
    open_files_hint,
    system_reason,
)
from qwen3next_train.train.memory_check import settings_that_help

_VARIABLES_OF_TORCH = ("TORCH", "PYTORCH")
_OF_DEVICE = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|GPU", re.IGNORECASE)
_AMOUNT = re.compile(r"[Tt]ried to allocate (\S+ [KMGTP]?i?B|\d+ bytes)|you tried to allocate (\d+ bytes)")


def foreseen(error: BaseException, config: Config | None = None) -> TrainError | None:
    """The error of ours that an exception stands for; None for a bug.

    Memory or files are used up, a file or pipe failed, or a variable has a value that torch does not take.

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
    if is_out_of_threads(error):
        return OutOfMemory("out of memory or processes: no further thread starts; raise ulimit -v or ulimit -u")
    if is_out_of_files(error):
        return StorageError(f"{_place(error)}: too many open files; {open_files_hint()}")
    if isinstance(error, OSError):
        return StorageError(_storage_line(error))
    variables = sorted(name for name in os.environ if name.startswith(_VARIABLES_OF_TORCH))
    if isinstance(error, ValueError) and variables and _happened_in_import_of("torch", error):
        reason = " ".join(str(error).split())
        return ConfigError(f"torch cannot be imported ({reason}); mend or unset {', '.join(variables)}")
    return None


def _happened_in_import_of(package: str, error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__", "").partition(".")[0] == package
        for frame in frames
    )


def _storage_line(error: OSError) -> str:
    reason = " ".join(system_reason(error).split())
    if "No usable temporary directory" in reason:
        return f"TMPDIR: {reason[0].lower()}{reason[1:]}; set it to a folder that can be written"
    return f"{_place(error)}: {reason} ({type(error).__name__}); free space, fix permissions or choose another place"


def _place(error: BaseException) -> str:
    names = (error.filename, error.filename2) if isinstance(error, OSError) else ()
    # A descriptor's number says nothing to anyone.
    if shown := [str(name) for name in names if name is not None and not isinstance(name, int)]:
        return ", ".join(shown)
    try:
        os.getcwd()
    except OSError:
        return "the working directory, which is gone"
    return "input/output"
