"""Imports of large libraries."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
_MAX_THREADS = 64
"""Of the OpenBLAS in numpy's wheels."""
_BYTES = 52 << 20
_BYTES_PER_THREAD = 39 << 20


def import_numpy() -> None:
    """Import numpy where there is room for it.

    Its OpenBLAS takes memory for every thread at once and ends the process when it gets none, with a code and a text of
    its own.

    Raises:
        OSError: there is no room (``ENOMEM``).
        ImportError: it cannot be imported.
    """
    given = (os.environ.get(name, "") for name in _THREAD_VARIABLES)
    asked = next((int(text) for text in given if text.isascii() and text.isdigit() and int(text) > 0), _MAX_THREADS)
    num_threads = min(asked, len(os.sched_getaffinity(0)), _MAX_THREADS)
    room = _BYTES + num_threads * _BYTES_PER_THREAD
    mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    import numpy  # noqa: F401


@contextmanager
def imported_to_stay() -> Iterator[None]:
    """Import without looking for garbage, there and ever after.

    An import makes several hundred thousand objects that live as long as the process. Python's collector would look
    through them again and again: during the import, now and then in training and twice when the process ends.

    Raises:
        OSError: there is no room for numpy, as of :func:`import_numpy`.
    """
    gc.disable()
    try:
        import_numpy()
        yield
    finally:
        gc.freeze()
        gc.enable()
