"""Pure arithmetic of the parallel layout: which rank holds which experts. No torch.

Every rank is a data-parallel rank (it has its own rows). Expert parallelism groups consecutive ranks:
ranks ``[k * ep, (k + 1) * ep)`` together hold one full set of experts (the expert-parallel group), and
ranks with equal ``rank % ep`` hold the same experts (the expert-data-parallel group).
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

    Raises:
        ConfigError: when ``expert_parallel_size`` does not divide ``world_size``.
    """

    world_size: int = 1
    rank: int = 0
    expert_parallel_size: int = 1
    ranks_per_node: int = RANKS_PER_NODE

    def __post_init__(self) -> None:
        if self.world_size % self.expert_parallel_size:
            raise ConfigError(
                f"parallel.expert_parallel_size: {self.expert_parallel_size} does not divide the world size "
                f"{self.world_size}; choose a divisor or start another number of processes"
            )

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
