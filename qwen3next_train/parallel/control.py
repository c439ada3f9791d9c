"""The control plane: small host-side agreements between ranks, apart from the data the model moves.

Values travel as JSON bytes in tensors, never as pickled objects, so a peer cannot make this process run code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

Json = Any
"""A value that ``json.dumps`` accepts."""


class ControlGroup(Protocol):
    """What the checkpoint layer and the train loop need to agree on things between ranks."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_true(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""

    def any_true(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""

    def broadcast_json(self, value: Json) -> Json:
        """Rank 0's ``value`` on every rank."""

    def gather_json(self, value: Json) -> list[Json]:
        """Every rank's ``value``, in rank order, on every rank."""

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Element-wise sum over ranks of equally long lists."""


class SingleProcess:
    """The control group of a run with one process."""

    rank = 0
    world_size = 1

    def all_true(self, flag: bool) -> bool:
        """``flag`` itself."""
        return flag

    def any_true(self, flag: bool) -> bool:
        """``flag`` itself."""
        return flag

    def broadcast_json(self, value: Json) -> Json:
        """``value`` as JSON would bring it back, so that one process sees what many would."""
        return json.loads(json.dumps(value))

    def gather_json(self, value: Json) -> list[Json]:
        """A list of the one value."""
        return [json.loads(json.dumps(value))]

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """``values`` themselves."""
        return list(values)


class GlooControlGroup:
    """Control group over a gloo process group of all ranks.

    Args:
        group: a gloo group that contains every rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @property
    def rank(self) -> int:
        """This process."""
        return dist.get_rank(self._group)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self._group)

    def all_true(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return bool(self._reduce(int(flag), dist.ReduceOp.MIN))

    def any_true(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return bool(self._reduce(int(flag), dist.ReduceOp.MAX))

    def broadcast_json(self, value: Json) -> Json:
        """Rank 0's ``value`` on every rank."""
        return self.gather_json(value if self.rank == 0 else None)[0]

    def gather_json(self, value: Json) -> list[Json]:
        """Every rank's ``value``, in rank order, on every rank."""
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(buffers, padded, group=self._group)
        return [json.loads(buffer[: int(size)].numpy().tobytes()) for buffer, size in zip(buffers, sizes, strict=True)]

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Element-wise sum over ranks of equally long lists."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._group)
        return [int(value) for value in tensor]

    def _reduce(self, value: int, op: dist.ReduceOp.RedOpType) -> int:
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=op, group=self._group)
        return int(tensor)
