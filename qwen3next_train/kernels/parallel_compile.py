"""Compiling several kernels at the same time.

Kernels are compiled when they are first called, one after the other as a model meets them, although compilers work
mostly outside of Python's lock and leave the other cores idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def call_side_by_side(calls: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Call each in a thread of its own, and wait for all.

    Args:
        calls: each launches other kernels than the others; results are dropped. The longest to compile best comes
            first.
        device: CUDA device they work on, on the caller's stream.

    Raises:
        Exception: what the first call in order that failed raised.
    """

    stream = torch.cuda.current_stream(device)

    def call(one: Callable[[], object]) -> None:
        # The current device and stream are each thread's own.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            one()

    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in pool.map(call, calls):
            pass
