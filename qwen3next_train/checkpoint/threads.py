"""Threads of one process that work on its part of a checkpoint side by side.

One thread reads, hashes or writes some GB a second of one file, less than storage for large models takes; torch has one
core in each of several processes, as torchrun starts them. All of this work leaves the interpreter to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MIN_BYTES = 256 << 20
"""Worth a thread."""
MAX_THREADS = 4

S = TypeVar("S")
T = TypeVar("T")


def num_threads(num_bytes: int) -> int:
    """For so much work."""
    return min(MAX_THREADS, max(1, num_bytes // MIN_BYTES))


def by_threads(function: Callable[[T], S], items: Sequence[T], threads: int) -> Iterator[S]:
    """``function`` of each item, in order, as ``map``: an exception is raised at the item that it is of."""
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint")
    try:
        yield from pool.map(function, items)
    finally:
        # Whoever has heard enough does not wait for what has not begun.
        pool.shutdown(cancel_futures=True)
