"""The kernels that take longest in a piece of work, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from device_timing import synchronize

from qwen3next_train.engine.step_profile import longest_kernels, new_profiler


def top_kernels(work: Callable[[], object], device: torch.device, *, count: int = 10) -> list[str]:
    """One line per kernel, the longest first, and one with the sums.

    Args:
        work: run once, warmed up before.
        device: whose kernels are listed; on CPU, operators.
        count: how many.
    """
    with new_profiler(device) as profiler:
        work()
        synchronize(device)
    kernels = longest_kernels(profiler.events(), device, 1)
    lines = [f"    {kernel.ms:8.2f} ms {kernel.calls:6.0f} x  {kernel.name[:100]}" for kernel in kernels[:count]]
    total, calls = sum(kernel.ms for kernel in kernels), sum(kernel.calls for kernel in kernels)
    return [*lines, f"    {total:8.2f} ms {calls:6.0f} kernels in all"]
