"""Exceptions of libraries and the system that say something about the machine, as the program's own errors."""

from __future__ import annotations

import errno
import re

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import OutOfMemory, StorageError, TrainError
from qwen3next_train.train.memory_check import settings_that_help

_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|can not) allocate memory|not enough memory|unable to allocate|"
    r"std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED|failed to allocate|ENOMEM",
    re.IGNORECASE,
)
_OF_DEVICE = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|GPU", re.IGNORECASE)
_AMOUNT = re.compile(r"[Tt]ried to allocate (\S+ [KMGTP]?i?B|\d+ bytes)|you tried to allocate (\d+ bytes)")


def foreseen(error: BaseException, config: Config | None = None) -> TrainError | None:
    """The error of ours that an exception stands for: memory is used up, a file or pipe failed; None for a bug.

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
    if isinstance(error, OSError):
        return StorageError(_storage_line(error))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of host or device was used up, which every library says in its own way."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError, by name: this must not import torch.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _storage_line(error: OSError) -> str:
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    if "No usable temporary directory" in reason:
        return f"TMPDIR: {reason[0].lower()}{reason[1:]}; set it to a folder that can be written"
    names = [name for name in (error.filename, error.filename2) if name is not None]
    # A descriptor's number says nothing to anyone.
    place = ", ".join(str(name) for name in names if not isinstance(name, int)) or "input/output"
    return f"{place}: {reason} ({type(error).__name__}); free space, fix permissions or choose another place"
