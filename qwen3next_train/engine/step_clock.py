"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Part = Literal["forward", "backward", "optimizer"]

_Mark = float | torch.cuda.Event


class StepClock:
    """Times parts of one step, on CUDA by events in the current stream, else by the host's clock.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: defaultdict[Part, list[tuple[_Mark, _Mark]]] = defaultdict(list)

    def begin_step(self) -> None:
        """Forget the step before."""
        self._spans.clear()

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Time what is done inside; what has the same name is added up."""
        start = self._mark()
        yield
        self._spans[name].append((start, self._mark()))

    def read(self) -> dict[str, float]:
        """Seconds by metric name (``perf/forward_s`` and so on).

        Waits for the device, which may still be updating weights when the step's other metrics are on the host.
        """
        return {f"perf/{name}_s": sum(_seconds(*span) for span in spans) for name, spans in self._spans.items()}

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end) / 1e3
