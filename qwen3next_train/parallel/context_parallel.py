"""Context parallelism: what the ranks that share the tokens of a row send each other (``model.sequence_group``).

The ranks of a group are consecutive, so that a group that is no larger than a machine lies in one. For DeepSpeed each
of them is a data-parallel rank: a step's loss is normalised once over all tokens, so that slices' gradients add up like
rows'.

Letters: P ranks, X rows of any number.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist

from qwen3next_train.model.router_losses import Summed
from qwen3next_train.parallel.transfers import Exchange, Gather, Shift, UnevenAllToAll, begin_sum
from qwen3next_train.topology import Topology


class ContextGroup:
    """One rank's group (``model.sequence_group.SequenceGroup``).

    Args:
        group: its ranks, in the order of their slices.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def exchange(self, parts_PX: torch.Tensor) -> torch.Tensor:
        """See :class:`SequenceGroup`."""
        one_each = [1] * self.size
        there, back = (UnevenAllToAll(self._group, one_each, one_each) for _ in range(2))
        return Exchange(there, back).start(parts_PX).finish()

    def from_previous(self, rows_X: torch.Tensor) -> torch.Tensor:
        """See :class:`SequenceGroup`."""
        # The same nodes on every rank, the first and the last included, so that backward passes meet in one order.
        return Exchange(Shift(self._group, 1), Shift(self._group, -1)).start(rows_X).finish()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """See :class:`SequenceGroup`."""
        gather = Gather(self._group)
        return gather.finish(gather.start(values.detach().unsqueeze(0)))

    def begin_sum(self, values: torch.Tensor) -> Summed:
        """Begin to sum over the ranks, in place; not differentiable (``model.router_losses.ReduceCounts``)."""
        return begin_sum(values, self._group)


def make_context_group(topology: Topology, *, timeout_s: float) -> ContextGroup | None:
    """This rank's group, None where it has its rows to itself. Every rank of the world has to call it.

    Args:
        topology: this rank's place.
        timeout_s: how long to wait for another rank before it counts as lost.
    """
    if topology.context_parallel_size == 1:
        return None
    return _group_of(topology.rank, topology.context_parallel_groups, timeout_s)


def make_row_group(topology: Topology, context_group: ContextGroup | None, *, timeout_s: float) -> ContextGroup | None:
    """The ranks that share rows with this one, by slices, heads or both; as :func:`make_context_group`.

    Args:
        topology: this rank's place.
        context_group: its context group, which is the one asked for where heads are not divided.
        timeout_s: as of :func:`make_context_group`.
    """
    if topology.tensor_parallel_size == 1:
        return context_group
    return _group_of(topology.rank, topology.row_groups, timeout_s)


def _group_of(rank: int, groups: Sequence[range], timeout_s: float) -> ContextGroup:
    timeout = datetime.timedelta(seconds=timeout_s)
    made = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in groups}
    return ContextGroup(next(group for ranks, group in made.items() if rank in ranks))
