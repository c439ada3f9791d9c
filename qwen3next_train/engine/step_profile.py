"""What steps consist of, by torch's profiler: kernels, exposed communication, idle time, waits of the host.

Imported only where something is profiled. ``exposed`` is communication without anything beside it, ``idle`` the time in
which nothing runs on the device, both between its first and last kernel.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qwen3next_train.engine import clipped_update, gradient_buckets, partitioned_parameters

PARTS = ("model", "exchange", "accumulation", "reduction", "norm", "AdamW", "gathering")
"""``model`` is all that has no other name; ``exchange`` is of tokens, ``reduction`` and ``gathering`` of gradients and
weights, ``accumulation`` and ``norm`` of gradients."""

_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_PARTS_BY_KERNEL = {
    "SendRecv": "exchange",
    "AllToAll": "exchange",
    "ReduceScatter": "reduction",
    "AllReduce": "reduction",
    "AllGather": "gathering",
    "_adamw_update": "AdamW",
    "FusedAdam": "AdamW",
}
_NUM_KERNELS = 20
_NAME_WIDTH = 100


@dataclass(frozen=True)
class Kernel:
    """A kernel, or on CPU an operator: per step, over all its calls.

    Args:
        name: as the profiler has it.
        ms: time on the device, or of the operator without those it calls.
        calls: how often.
    """

    name: str
    ms: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """What one step consists of, a mean over the profiled ones.

    Args:
        parts: milliseconds of the device (on CPU of the host) by part, :data:`PARTS`.
        exposed_ms: communication kernels beside which nothing ran.
        idle_ms: nothing ran; 0 on CPU, as is ``exposed_ms``.
        host_waits: calls in which the host waits for the device.
        host_wait_ms: time in them.
        kernels: the longest first.
    """

    parts: dict[str, float]
    exposed_ms: float
    idle_ms: float
    host_waits: float
    host_wait_ms: float
    kernels: tuple[Kernel, ...]


def new_profiler(device: torch.device) -> profile:
    """A profiler of host and device."""
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])


def read_profile(events: Sequence[Any], device: torch.device, num_steps: int) -> StepProfile:
    """Sum up a profiler's events.

    Args:
        events: of ``num_steps`` steps (``profile.events()``), taken under :func:`named_parts`.
        device: where the model is.
        num_steps: to divide by.
    """
    on_device = [event for event in events if _is_kernel(event, device)]
    spans = [(event.time_range.start, event.time_range.end, event.name.startswith("nccl")) for event in on_device]
    exposed_us, idle_us = exposed_and_idle(spans)
    waits = [event for event in events if event.name in _WAITS]
    return StepProfile(
        parts={part: ms / num_steps for part, ms in _parts(events, on_device, device).items()},
        exposed_ms=exposed_us / 1e3 / num_steps,
        idle_ms=idle_us / 1e3 / num_steps,
        host_waits=len(waits) / num_steps,
        host_wait_ms=sum(event.cpu_time_total for event in waits) / 1e3 / num_steps,
        kernels=longest_kernels(events, device, num_steps),
    )


def longest_kernels(events: Iterable[Any], device: torch.device, num_steps: int) -> tuple[Kernel, ...]:
    """Every kernel, on CPU every operator, the longest first."""
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if device.type == "cuda":
            # Not what the profiler lays at the door of the operators, or each kernel would count twice.
            time_us = event.time_range.elapsed_us() if _is_kernel(event, device) else 0.0
        else:
            time_us = 0.0 if event.is_user_annotation else event.self_cpu_time_total
        if time_us:
            spent[event.name][0] += time_us / 1e3 / num_steps
            spent[event.name][1] += 1 / num_steps
    kernels = (Kernel(name, ms, calls) for name, (ms, calls) in spent.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.ms))


def exposed_and_idle(spans: Iterable[tuple[float, float, bool]]) -> tuple[float, float]:
    """Time with communication alone, and time with nothing, of ``(start, end, is communication)``."""
    edges = sorted(
        (moment, change, communicates)
        for start, end, communicates in spans
        for moment, change in ((start, 1), (end, -1))
    )
    running = {True: 0, False: 0}
    exposed = idle = 0.0
    before = edges[0][0] if edges else 0.0
    for moment, change, communicates in edges:
        if not running[False]:
            if running[True]:
                exposed += moment - before
            else:
                idle += moment - before
        running[communicates] += change
        before = moment
    return exposed, idle


def profile_table(profiled: StepProfile, *, heading: str, on_gpu: bool, wall_ms: float) -> list[str]:
    """A profile as lines of text.

    Args:
        profiled: what to show.
        heading: of which steps, rank and device.
        on_gpu: on CPU only the parts that are ranges of the host are known, and nothing is exposed or idle.
        wall_ms: from one step to the next, logging included, profiler on.
    """
    lines = [heading, "milliseconds of a step, mean; the profiler's own time is part of the wall time", ""]
    lines.append(f"{wall_ms:10.2f}  wall time")
    lines += [f"{ms:10.2f}  {part}" for part, ms in profiled.parts.items() if ms or on_gpu]
    if on_gpu:
        lines.append(f"{profiled.exposed_ms:10.2f}  exposed communication")
        lines.append(f"{profiled.idle_ms:10.2f}  idle")
        lines.append(f"{profiled.host_wait_ms:10.2f}  host waits for the device, {profiled.host_waits:.1f} times")
    lines += ["", f"{'ms':>10} {'calls':>8}  kernel"]
    shown = profiled.kernels[:_NUM_KERNELS]
    lines += [f"{kernel.ms:10.2f} {kernel.calls:8.1f}  {kernel.name[:_NAME_WIDTH]}" for kernel in shown]
    total_ms = sum(kernel.ms for kernel in profiled.kernels)
    calls = sum(kernel.calls for kernel in profiled.kernels)
    return [*lines, f"{total_ms:10.2f} {calls:8.1f}  all {len(profiled.kernels)}"]


@contextmanager
def named_parts() -> Iterator[None]:
    """Show what the engine does to gradients as ranges of the profiler."""
    named = {
        (gradient_buckets._Bucket, "add"): "accumulation",
        (gradient_buckets._Bucket, "_take"): "accumulation",
        (partitioned_parameters, "_fill_rows"): "accumulation",
        (partitioned_parameters.PartitionedParameterOptimizer, "_finish_reductions"): "accumulation",
        (clipped_update.ClippedUpdate, "_gradient_norm"): "norm",
    }
    originals = {place: getattr(*place) for place in named}
    for (owner, attribute), name in named.items():
        setattr(owner, attribute, _in_range(originals[owner, attribute], f"part {name}"))
    try:
        yield
    finally:
        for (owner, attribute), original in originals.items():
            setattr(owner, attribute, original)


def _in_range(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def _is_kernel(event: Any, device: torch.device) -> bool:
    return (
        device.type == "cuda" and event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )


def _parts(events: Sequence[Any], on_device: Sequence[Any], device: torch.device) -> dict[str, float]:
    """Milliseconds by part, of all steps."""
    on_gpu = device.type == "cuda"
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        name = event.name.removeprefix("part ")
        if not on_gpu and event.name.startswith("Optimizer.step#"):
            # On a GPU it is told by its kernel, which the profiler does not lay at the range's door.
            name = "AdamW"
        if event.device_type == torch.autograd.DeviceType.CPU and name != event.name:
            parts[name] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3
    for event in on_device:
        part = next((part for word, part in _PARTS_BY_KERNEL.items() if word in event.name), None)
        if part is not None:
            parts[part] += (event.time_range.end - event.time_range.start) / 1e3
    total = sum(event.time_range.end - event.time_range.start for event in on_device) / 1e3
    parts["model"] = max(0.0, total - sum(parts.values()))
    return parts
