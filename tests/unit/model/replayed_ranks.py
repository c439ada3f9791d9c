"""The ranks of a context group one after the other, on one device: what the others send is that of the pass before.

What a rank sends does not depend on what it is sent, as far as that is gathered (:class:`SequenceGroup`): the summaries
of slices, and the gradients of arriving states by a slice's own outputs. So in the second pass every rank is sent what
it should be, forward, and in the third backward too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_PASSES = 3


class ReplayedGroup:
    """A ``SequenceGroup`` that gathers; it neither exchanges nor sums.

    Args:
        rank: whose turn it is.
        sent: by number of the gather and rank, filled as they are sent.
        size: number of ranks.
    """

    def __init__(self, rank: int, sent: dict[tuple[int, int], torch.Tensor], size: int) -> None:
        self.rank, self.size = rank, size
        self._sent, self._num_gathers = sent, 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        number = self._num_gathers
        self._num_gathers += 1
        self._sent[number, self.rank] = values.detach()
        nothing = torch.zeros_like(values)
        return torch.stack([self._sent.get((number, rank), nothing) for rank in range(self.size)])

    def exchange(self, parts_PX: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def from_previous(self, rows_X: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def on_replayed_ranks(size: int, function: Callable[[ReplayedGroup], T]) -> list[T]:
    """What ``function``, forward and backward, returns on each rank when everybody has been sent what he should be."""
    sent: dict[tuple[int, int], torch.Tensor] = {}
    results: list[T] = []
    for _ in range(_PASSES):
        results = [function(ReplayedGroup(rank, sent, size)) for rank in range(size)]
    return results
