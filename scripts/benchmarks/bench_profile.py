"""The kernels that take longest in a piece of work, by torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from device_timing import synchronize
from torch.profiler import ProfilerActivity, profile


def top_kernels(work: Callable[[], object], device: torch.device, *, count: int = 10) -> list[str]:
    """One line per kernel, the longest first, and one with the sums.

    Args:
        work: run once, warmed up before.
        device: whose kernels are listed; on CPU, operators.
        count: how many.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        synchronize(device)
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time_us:
            spent[event.name][0] += time_us / 1e3
            spent[event.name][1] += 1
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])
    total = sum(ms for ms, _ in spent.values())
    calls = sum(number for _, number in spent.values())
    lines = [f"    {ms:8.2f} ms {int(number):6d} x  {name[:100]}" for name, (ms, number) in ranked[:count]]
    return [*lines, f"    {total:8.2f} ms {int(calls):6d} kernels in all"]
