"""Threads of one process that work on its part of a checkpoint side by side.

One thread reads, hashes or writes some GB a second of one file, less than storage for large models takes; torch has one
core in each of several processes, as torchrun starts them. All of this work leaves the interpreter to others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from qwen3next_train.exhaustion import is_out_of_threads

MIN_BYTES = 256 << 20
"""Worth a thread."""
MAX_THREADS = 4

S = TypeVar("S")
T = TypeVar("T")


def num_threads(num_bytes: int, *, least: int | None = None) -> int:
    """For so much work, of which ``least`` bytes are worth a thread (default :data:`MIN_BYTES`)."""
    return min(MAX_THREADS, max(1, num_bytes // (least or MIN_BYTES)))


def by_threads(
    function: Callable[[T], S], items: Sequence[T], threads: int, *, enough: threading.Event | None = None
) -> Iterator[S]:
    """``function`` of each item, in order, as ``map``: an exception is raised at the item that it is of.

    Where the system gives fewer threads, those do the work, and without any, the caller's. What has begun is waited
    for; ``enough`` is set when nobody wants its result, so that a long ``function`` can return before its end.
    """
    futures: list[Future[S]] = [Future() for _ in items]
    waiting = deque(zip(items, futures, strict=True))

    def work() -> None:
        # Threads take from one end only, so that none takes what another has.
        with suppress(IndexError):
            while True:
                item, future = waiting.popleft()
                _settle(future, function, item)

    started = _start(work, threads) if threads > 1 else []
    try:
        if not started:
            yield from map(function, items)
            return
        for future in futures:
            yield future.result()
    finally:
        # Whoever has heard enough does not wait for what has not begun.
        waiting.clear()
        if enough is not None:
            enough.set()
        for thread in started:
            thread.join()


def _settle(future: Future[S], function: Callable[[T], S], item: T) -> None:
    try:
        future.set_result(function(item))
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)


def _start(work: Callable[[], None], count: int) -> list[threading.Thread]:
    """As many threads as the system gives."""
    started = []
    for number in range(count):
        thread = threading.Thread(target=work, name=f"checkpoint_{number}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not is_out_of_threads(error):
                raise
            # A save that takes longer loses less than a run that ends without one.
            break
        started.append(thread)
    return started
