"""Pure arithmetic of the parallel layout: which rank holds which experts. No torch.

For the optimizer every rank is a data-parallel rank (it has tokens of its own). Expert parallelism groups consecutive
ranks: ranks ``[k * ep, (k + 1) * ep)`` together hold one full set of experts (the expert-parallel group), and
ranks with equal ``rank % ep`` hold the same experts (the expert-data-parallel group). Context parallelism groups
consecutive ranks too, whatever the expert-parallel size: ranks ``[k * cp, (k + 1) * cp)`` have the k-th share of the
rows, and of each of these rows one slice each.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3next_train.errors import ConfigError

RANKS_PER_NODE = 8
"""Of the usual machine, where nothing is known of it."""


@dataclass(frozen=True)
class Topology:
    """One rank's place in the layout.

    Args:
        world_size: number of processes.
        rank: this process, ``0 <= rank < world_size``.
        expert_parallel_size: ranks that share one set of experts; divides ``world_size``.
        ranks_per_node: consecutive ranks that share a machine.
        context_parallel_size: ranks that share the tokens of a row; divides ``world_size``.

    Raises:
        ConfigError: when a size does not divide ``world_size``.
    """

    world_size: int = 1
    rank: int = 0
    expert_parallel_size: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    context_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("expert_parallel_size", "context_parallel_size"):
            size = getattr(self, name)
            if self.world_size % size:
                raise ConfigError(
                    f"parallel.{name}: {size} does not divide the world size {self.world_size}; choose a divisor or "
                    "start another number of processes"
                )

    @property
    def data_parallel_size(self) -> int:
        """Shares that the rows of a step are divided into."""
        return self.world_size // self.context_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the rows this rank has, or a slice of."""
        return self.rank // self.context_parallel_size

    @property
    def context_parallel_rank(self) -> int:
        """Which slice of its rows this rank has."""
        return self.rank % self.context_parallel_size

    @property
    def context_parallel_groups(self) -> list[range]:
        """The ranks of every context group, in order."""
        size = self.context_parallel_size
        return [range(first, first + size) for first in range(0, self.world_size, size)]

    @property
    def expert_parallel_rank(self) -> int:
        """Position inside the expert-parallel group."""
        return self.rank % self.expert_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // self.expert_parallel_size

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts this rank holds.

        Raises:
            ConfigError: when the expert-parallel size does not divide ``num_experts``.
        """
        if num_experts % self.expert_parallel_size:
            raise ConfigError(
                f"parallel.expert_parallel_size: {self.expert_parallel_size} does not divide model.num_experts "
                f"{num_experts}; choose a divisor of both the world size and the number of experts"
            )
        num_local = num_experts // self.expert_parallel_size
        first = self.expert_parallel_rank * num_local
        return range(first, first + num_local)
