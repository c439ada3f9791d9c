"""Times of the parts of a step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from qwen3next_train.engine import step_clock
from qwen3next_train.engine.step_clock import StepClock


def spend(clock: StepClock) -> dict[str, float]:
    clock.begin_step()
    for _ in range(2):
        with clock.part("forward"):
            pass
        with clock.part("backward"), clock.part("optimizer"):
            pass
    return clock.read()


def test_parts_of_the_same_name_are_added_up_and_a_step_forgets_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # Marks at 1, 4, 9, 16, ... seconds.
    moments = (float(number * number) for number in itertools.count(1))
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: next(moments))
    clock = StepClock(torch.device("cpu"))
    # forward 1 to 4 and 49 to 64, backward 9 to 36 and 81 to 144, optimizer 16 to 25 and 100 to 121.
    assert spend(clock) == {"perf/forward_s": 18.0, "perf/backward_s": 90.0, "perf/optimizer_s": 30.0}
    # The marks 13 to 24: forward 13 to 14 and 19 to 20, and so on.
    assert spend(clock) == {"perf/forward_s": 66.0, "perf/backward_s": 234.0, "perf/optimizer_s": 78.0}


def test_on_a_gpu_the_devices_own_time_is_read_once_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()

    class Event:
        """Milliseconds on the device are ten times the number of the event."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.number = next(numbers)

        def synchronize(self) -> None:
            self.is_over = True

        def elapsed_time(self, end: Any) -> float:
            assert end.is_over, "CUDA raises an error"
            return 10.0 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert spend(StepClock(torch.device("cuda"))) == {
        "perf/forward_s": pytest.approx(0.02),
        "perf/backward_s": pytest.approx(0.06),
        "perf/optimizer_s": pytest.approx(0.02),
    }
