"""The ranks of a context group as threads of this process, on the CPU: what they send is handed over in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from qwen3next_train.model.router_losses import Summed

T = TypeVar("T")


class _Meeting:
    """Where all threads leave something and take what the others have left."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: T) -> list[T]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadGroup:
    """A ``SequenceGroup`` of threads."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size, self._meeting = rank, len(meeting.slots), meeting

    def exchange(self, parts_PX: torch.Tensor) -> torch.Tensor:
        return _Exchange.apply(parts_PX, self)

    def from_previous(self, rows_X: torch.Tensor) -> torch.Tensor:
        return _FromPrevious.apply(rows_X, self)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._meeting.exchange(self.rank, values.detach().clone()))

    def begin_sum(self, values: torch.Tensor) -> Summed:
        total = self.gather(values).sum(0)
        return lambda: total


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts_PX: torch.Tensor, group: ThreadGroup) -> torch.Tensor:
        ctx.group = group
        return group.gather(parts_PX)[:, group.rank].clone()

    @staticmethod
    def backward(ctx: Any, grad_PX: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.gather(grad_PX)[:, ctx.group.rank].clone(), None


class _FromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_X: torch.Tensor, group: ThreadGroup) -> torch.Tensor:
        ctx.group = group
        found = group.gather(rows_X)
        return found[group.rank - 1] if group.rank else torch.zeros_like(rows_X)

    @staticmethod
    def backward(ctx: Any, grad_X: torch.Tensor) -> tuple[torch.Tensor, None]:
        found = ctx.group.gather(grad_X)
        last = ctx.group.rank == ctx.group.size - 1
        return torch.zeros_like(grad_X) if last else found[ctx.group.rank + 1], None


def on_ranks(size: int, function: Callable[[ThreadGroup], T]) -> list[T]:
    """``function`` on every rank at a time; its results in the order of the ranks."""
    meeting = _Meeting(size)

    def perform(rank: int) -> T:
        try:
            return function(ThreadGroup(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(perform, rank) for rank in range(size)]
        failures: Sequence[BaseException] = [error for future in futures if (error := future.exception()) is not None]
        for failure in failures:
            if not isinstance(failure, threading.BrokenBarrierError):
                raise failure
        return [future.result() for future in futures]
