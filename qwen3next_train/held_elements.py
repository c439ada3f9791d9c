"""Which elements of each parameter a rank holds: a share of the experts, a share of the mixers' heads, or all.

A rank holds a parameter as a tensor of its own, laid out like the whole one. In the flattened whole its elements are
*runs*: of experts, and of heads along dimension 0, one run for each block of heads (three in the convolution, whose
channels are those of q, then k, then v); of heads along the columns of an output projection, a run in every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qwen3next_train.parameters import ParamSpec
from qwen3next_train.topology import Topology


@dataclass(frozen=True)
class Runs:
    """Equally long runs of elements at equal distances.

    Args:
        start: first element.
        length: elements of a run.
        count: runs.
        stride: from the start of one run to the start of the next; of one run 0.
    """

    start: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def numel(self) -> int:
        """Elements of all runs."""
        return self.length * self.count

    @property
    def stop(self) -> int:
        """Behind the last element."""
        return self.start + (self.count - 1) * self.stride + self.length

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Of a flattened tensor the runs ``[count, length]``, a view."""
        return values.as_strided((self.count, self.length), (self.stride, 1), values.storage_offset() + self.start)

    def part(self, begin: int, end: int) -> list[Runs]:
        """The runs of elements ``[begin, end)``, counted over the runs one after the other: at most three."""
        first, last = -(-begin // self.length), end // self.length
        if first > last:
            # Inside one run.
            return [self._of_one(first - 1, begin, end)]
        found = []
        if begin < first * self.length:
            found.append(self._of_one(first - 1, begin, first * self.length))
        if first < last:
            count = last - first
            stride = self.stride if count > 1 else 0
            found.append(replace(self, start=self.start + first * self.stride, count=count, stride=stride))
        if last * self.length < end:
            found.append(self._of_one(last, last * self.length, end))
        return found

    def _of_one(self, index: int, begin: int, end: int) -> Runs:
        return Runs(self.start + index * self.stride + begin - index * self.length, end - begin)


def held_shape(spec: ParamSpec, topology: Topology) -> tuple[int, ...]:
    """Shape of what a rank holds of a parameter."""
    if spec.expert:
        return len(topology.local_experts(spec.shape[0])), *spec.shape[1:]
    if spec.heads is None:
        return spec.shape
    dim, shares = spec.heads.dim, topology.head_shares(spec.heads.count)
    return *spec.shape[:dim], spec.shape[dim] // shares, *spec.shape[dim + 1 :]


def held_runs(spec: ParamSpec, topology: Topology) -> tuple[Runs, ...]:
    """What a rank holds of a parameter, in the order of its own flattened tensor."""
    if spec.expert:
        experts = topology.local_experts(spec.shape[0])
        of_one = spec.numel // spec.shape[0]
        return (Runs(experts.start * of_one, len(experts) * of_one),)
    if spec.heads is None or topology.tensor_parallel_size == 1:
        return (Runs(0, spec.numel),)
    dim, blocks = spec.heads.dim, spec.heads.blocks
    shares = topology.head_shares(spec.heads.count)
    inner, rows = math.prod(spec.shape[dim + 1 :]), math.prod(spec.shape[:dim])
    assert rows == 1 or len(blocks) == 1, "blocks of heads along columns"
    runs, before = [], 0
    for block in blocks:
        length = block * inner // shares
        start = before * inner + topology.head_share(shares) * length
        runs.append(Runs(start, length, rows, spec.shape[dim] * inner if rows > 1 else 0))
        before += block
    return tuple(runs)


def runs_of_range(held: Sequence[Runs], begin: int, end: int) -> Iterator[tuple[int, Runs]]:
    """Elements ``[begin, end)`` of what a rank holds: the runs they are in the whole parameter.

    Args:
        held: of :func:`held_runs`.
        begin: in the rank's own flattened tensor.
        end: likewise, behind the last.

    Yields:
        where runs begin, counted from ``begin``, and the runs.
    """
    before = 0
    for runs in held:
        first, last = max(begin - before, 0), min(end - before, runs.numel)
        if first < last:
            at = before + first - begin
            for part in runs.part(first, last):
                yield at, part
                at += part.numel
        before += runs.numel
