"""Times and peak memory of work on one device, as the benchmarks report them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """What repeated runs of one piece of work took.

    Args:
        ms: milliseconds of each run, in order.
        peak_bytes: device memory in tensors at the worst moment, what was there before included; 0 on CPU.
        first_s: seconds of the first run, with compilation and tuning of kernels.
    """

    ms: tuple[float, ...]
    peak_bytes: int
    first_s: float

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.ms)


class AdamWTimer:
    """Milliseconds of the optimizer's own kernels in the last step, by torch's hooks around every ``step``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []

    def clear(self) -> None:
        """Forget what was measured."""
        self._marks.clear()

    @contextmanager
    def listening(self) -> Iterator[AdamWTimer]:
        """Measure every optimizer's steps meanwhile."""
        handles = [register_optimizer_step_pre_hook(self._mark), register_optimizer_step_post_hook(self._mark)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def total_ms(self) -> float:
        """Sum since :meth:`clear`; the device has to be done."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(
            start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1e3 * (end - start)
            for start, end in pairs
        )

    def _mark(self, optimizer: object, args: object, kwargs: object) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


def measure(work: Callable[[], object], device: torch.device, *, iterations: int, warmup: int = 3) -> Timing:
    """Run ``work`` ``1 + warmup + iterations`` times and time the last ones.

    Args:
        work: leaves its results to be freed; on CUDA it may return before the device is done.
        device: where it works.
        iterations: timed runs, at least 1.
        warmup: untimed runs after the first.
    """
    started = time.perf_counter()
    work()
    synchronize(device)
    first_s = time.perf_counter() - started
    for _ in range(warmup):
        work()
    synchronize(device)
    if device.type != "cuda":
        return Timing(tuple(_host_ms(work) for _ in range(iterations)), 0, first_s)
    torch.cuda.reset_peak_memory_stats(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronize(device)
    times = tuple(start.elapsed_time(end) for start, end in pairwise(marks))
    return Timing(times, torch.cuda.max_memory_allocated(device), first_s)


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the results are of."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _host_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)
