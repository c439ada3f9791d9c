"""What is used up on this machine, memory, threads or open files, in the many ways in which libraries say so."""

from __future__ import annotations

import errno
import os
import re
import resource

_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|can not) allocate memory|not enough memory|unable to allocate|"
    r"std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED|failed to allocate|ENOMEM|failed to map segment from shared object",
    re.IGNORECASE,
)
_TOO_MANY_FILES = os.strerror(errno.EMFILE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of host or device was used up."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError, by name: this must not import torch.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    # A library that does not fit is an ImportError, or an OSError without number where ctypes loads it.
    return isinstance(error, RuntimeError | ImportError | OSError) and _NO_MEMORY.search(str(error)) is not None


def is_out_of_threads(error: BaseException) -> bool:
    """Whether the system has refused another thread, for want of memory or by the limit of processes."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def is_out_of_files(error: BaseException) -> bool:
    """Whether this process may open no further file, which gloo, safetensors and imports say in their text only."""
    return _TOO_MANY_FILES in str(error)


def system_reason(error: OSError) -> str:
    """The system's reason, with what raises the limit where a limit of the process is the reason."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EMFILE:
        return f"{reason}: {open_files_hint()}"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if error.errno == errno.EFBIG and limit != resource.RLIM_INFINITY:
        return f"{reason}: raise the limit, ulimit -f, which is {limit // 1024}"
    return reason


def memory_limit_hint() -> str:
    """What to do where this process may have only so much memory, ready for more to follow; empty without a limit."""
    limits = (("-v", resource.RLIMIT_AS), ("-d", resource.RLIMIT_DATA))
    found = [(option, resource.getrlimit(limit)[0] // 1024) for option, limit in limits]
    raised = [f"ulimit {option}, which is {limit}" for option, limit in found if limit >= 0]
    return f"raise {' and '.join(raised)}, or " if raised else ""


def open_files_hint() -> str:
    """What to do where there are too many open files."""
    return f"raise the limit, ulimit -n, which is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
