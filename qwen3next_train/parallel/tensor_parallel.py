"""Tensor parallelism: what ranks that divide the mixers' heads send each other (``model.head_group``).

The ranks of a group are consecutive. For DeepSpeed each of them is a data-parallel rank, but for the parameters that
are divided (``engine.divided_parameters``).

Letters: T tokens of this rank, U = P T tokens of its group, P ranks, D hidden.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.parallel.transfers import Exchange, Gather, SumOverRanks, rows_of_ranks
from qwen3next_train.topology import Topology


class TensorGroup:
    """One rank's group (``model.head_group.HeadGroup``).

    Args:
        group: its ranks, in the order of their shares.
        permutation: adds the ranks' terms: in their order, in at least fp32, rounded once.
    """

    def __init__(self, group: dist.ProcessGroup, permutation: TokenPermutation) -> None:
        self._group = group
        self._permutation = permutation
        self._order: Permutation | None = None
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """See :class:`HeadGroup`."""
        return Exchange(Gather(self._group), self._sum(x_TD.shape[0], x_TD.device)).start(x_TD).finish()

    def add_up(self, y_UD: torch.Tensor) -> torch.Tensor:
        """See :class:`HeadGroup`."""
        there = self._sum(y_UD.shape[0] // self.size, y_UD.device)
        return Exchange(there, Gather(self._group)).start(y_UD).finish()

    def _sum(self, num_tokens: int, device: torch.device) -> SumOverRanks:
        # Of one size at a time: training has one, generation many.
        if self._order is None or self._order.row_TK.shape[0] != num_tokens:
            self._order = rows_of_ranks(num_tokens, self.size, device)
        return SumOverRanks(self._group, self._permutation, self._order)


def make_tensor_group(topology: Topology, permutation: TokenPermutation, *, timeout_s: float) -> TensorGroup | None:
    """This rank's group, None where it has all heads. Every rank of the world has to call it.

    Args:
        topology: this rank's place.
        permutation: see :class:`TensorGroup`.
        timeout_s: how long to wait for another rank before it counts as lost.
    """
    if topology.tensor_parallel_size == 1:
        return None
    timeout = datetime.timedelta(seconds=timeout_s)
    groups = [dist.new_group(list(ranks), timeout=timeout) for ranks in topology.tensor_parallel_groups]
    return TensorGroup(groups[topology.rank // topology.tensor_parallel_size], permutation)
