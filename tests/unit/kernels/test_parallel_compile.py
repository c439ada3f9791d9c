"""Calls in threads of their own, each on the device it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from qwen3next_train.kernels.parallel_compile import call_side_by_side

DEVICE = torch.device("cuda", 3)
streams: list[str] = []


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.device]:
    """Current device by thread, without a GPU."""
    current: dict[int, torch.device] = {}

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current[threading.get_ident()] = wanted
        yield
        del current[threading.get_ident()]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream of the caller")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(streams.append(stream)))
    return current


def test_all_run_at_the_same_time_on_the_device(devices: dict[int, torch.device]) -> None:
    # Each waits for the others: one after the other they would never end.
    together = threading.Barrier(4, timeout=60)
    seen = []

    def call() -> None:
        together.wait()
        seen.append(devices[threading.get_ident()])

    streams.clear()
    call_side_by_side([call] * 4, DEVICE)
    assert seen == [DEVICE] * 4
    assert streams == ["stream of the caller"] * 4


def test_a_failure_comes_out_after_all_are_done(devices: dict[int, torch.device]) -> None:
    failed, done = threading.Event(), []

    def fail() -> None:
        failed.set()
        raise ValueError("of the first")

    def go_on() -> None:
        failed.wait(60)
        done.append(True)

    with pytest.raises(ValueError, match="of the first"):
        call_side_by_side([fail, go_on, go_on], DEVICE)
    assert done == [True, True]
