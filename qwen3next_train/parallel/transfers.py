"""Rows that travel between ranks while the device computes, and their gradients on the way back.

A transfer is started and later finished; until then what it returned must not be read. With NCCL to finish one makes
the device's next work wait, not the host; a group's transfers run one after the other, in the order of their start, on
a stream of their own. With gloo the host waits.

In the backward pass the end of the way there is the start of the way back, and autograd runs the latest node first:
what stands between start and finish in the forward pass runs beside the exchange in both passes.

Letters: T tokens of this rank, P ranks, N = P T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.model.router_losses import Summed


class Transfer(Protocol):
    """One collective between the ranks of a group."""

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Post it; what it returns may be read after :meth:`finish`."""

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """What arrived, given what :meth:`start` returned."""


class _Collective:
    """What all transfers do alike.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        # With the tensors it reads and writes, which must live as long.
        self._under_way: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def wait(self) -> None:
        """Until everything has arrived."""
        if self._under_way is not None:
            self._under_way[0].wait()
            self._under_way = None

    def _post(self, work: Any, arriving: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self._under_way = work, arriving, rows
        return arriving


class UnevenAllToAll(_Collective):
    """Some rows to each rank, known on the host.

    Args:
        group: the ranks.
        to_each: rows for each rank, in this order in what is sent.
        from_each: rows from each rank.
    """

    def __init__(self, group: dist.ProcessGroup, to_each: Sequence[int], from_each: Sequence[int]) -> None:
        super().__init__(group)
        self._to_each, self._from_each = list(to_each), list(from_each)

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`Transfer`."""
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(self._from_each), *rows.shape[1:])
        work = dist.all_to_all_single(
            _bytes(arriving), _bytes(rows), self._from_each, self._to_each, group=self._group, async_op=True
        )
        return self._post(work, arriving, rows)

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """The rows from rank 0, then those from rank 1, and so on."""
        self.wait()
        return arriving.view_as(arriving)


class Shift(_Collective):
    """All rows of a rank to the one ``by`` places behind it: ``[X, ...]`` to ``[X, ...]``, zeros where none is before.

    Args:
        group: the ranks.
        by: places, negative towards the first rank.
    """

    def __init__(self, group: dist.ProcessGroup, by: int) -> None:
        super().__init__(group)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._to, self._from = ([int(rank + way == other) for other in range(size)] for way in (by, -by))

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`Transfer`."""
        rows = rows.contiguous()
        arriving = torch.empty_like(rows) if any(self._from) else torch.zeros_like(rows)
        from_each, to_each = ([rows.shape[0] * part for part in parts] for parts in (self._from, self._to))
        inside, outside = _bytes(arriving)[: sum(from_each)], _bytes(rows)[: sum(to_each)]
        work = dist.all_to_all_single(inside, outside, from_each, to_each, group=self._group, async_op=True)
        return self._post(work, arriving, rows)

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """The rows of the rank ``by`` places before."""
        self.wait()
        return arriving.view_as(arriving)


class Gather(_Collective):
    """All ranks' rows to all ranks: ``[T, ...]`` to ``[N, ...]``, row ``s T + t`` from rank s. T is the same on all."""

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`Transfer`."""
        rows = rows.contiguous()
        arriving = rows.new_empty(dist.get_world_size(self._group) * rows.shape[0], *rows.shape[1:])
        work = dist.all_gather_into_tensor(_bytes(arriving), _bytes(rows), group=self._group, async_op=True)
        return self._post(work, arriving, rows)

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """``[N, ...]``."""
        self.wait()
        return arriving.view_as(arriving)


class SumOverRanks(_Collective):
    """The transpose of :class:`Gather`: ``[N, D]`` to ``[T, D]``, the ranks' terms for this rank's tokens added up.

    The terms travel as they are (an even all-to-all) and are added here, in the order of the ranks, in at least fp32
    and rounded once: a reduce-scatter's order and rounding are the library's.

    Args:
        group: the ranks.
        permutation: adds.
        order: :func:`rows_of_ranks` of T.
    """

    def __init__(self, group: dist.ProcessGroup, permutation: TokenPermutation, order: Permutation) -> None:
        super().__init__(group)
        self._permutation, self._order = permutation, order

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`Transfer`."""
        rows = rows.contiguous()
        arriving = torch.empty_like(rows)
        work = dist.all_to_all_single(_bytes(arriving), _bytes(rows), group=self._group, async_op=True)
        return self._post(work, arriving, rows)

    def finish(self, arriving: torch.Tensor) -> torch.Tensor:
        """``[T, D]``."""
        self.wait()
        return self._permutation.unpermute(arriving, self._order)


def begin_sum(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> Summed:
    """Begin to sum ``values`` over the ranks of a group, by default all, in place; not differentiable."""
    work = dist.all_reduce(values, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return values

    return finish


def rows_of_ranks(num_tokens: int, num_ranks: int, device: torch.device) -> Permutation:
    """T tokens, each with a row for each of P ranks: row ``p T + t``."""
    token_T = torch.arange(num_tokens, device=device)
    row_TP = token_T.unsqueeze(1) + num_tokens * torch.arange(num_ranks, device=device)
    return Permutation(token_T.repeat(num_ranks), row_TP, token_T.new_full((num_ranks,), num_tokens))


@dataclass(eq=False)
class Exchange:
    """A way there and, for the gradients, the way back.

    Args:
        there: of the rows.
        back: of their gradients; the transpose of ``there``.
        returning: gradients under way.
    """

    there: Transfer
    back: Transfer
    returning: torch.Tensor | None = None

    def start(self, rows: torch.Tensor) -> Travelling:
        """Send rows off; differentiable."""
        return Travelling(_Start.apply(rows, self), self)


@dataclass(frozen=True, eq=False)
class Travelling:
    """Rows under way.

    Args:
        arriving: what nobody may read yet.
        exchange: how they travel.
    """

    arriving: torch.Tensor
    exchange: Exchange

    def finish(self) -> torch.Tensor:
        """The rows, arrived; differentiable, once."""
        rows: torch.Tensor = _Finish.apply(self.arriving, self.exchange)
        return rows

    def arrived(self) -> torch.Tensor:
        """The rows, arrived, for what needs no gradient; before :meth:`finish`."""
        return self.exchange.there.finish(self.arriving.detach())


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.there.start(rows)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Taken out, because a node's attributes live as long as the graph.
        returning, ctx.exchange.returning = ctx.exchange.returning, None
        return ctx.exchange.back.finish(returning), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange, ctx.size = exchange, arriving.shape
        return exchange.there.finish(arriving)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.returning = ctx.exchange.back.start(grad)
        # A gradient of the size that autograd looks for; nobody reads it.
        return grad.new_empty(()).expand(ctx.size), None


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """As bytes, because gloo and NCCL each lack some dtypes."""
    return rows.view(torch.uint8)
