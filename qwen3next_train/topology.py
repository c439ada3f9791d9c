"""Pure arithmetic of the parallel layout: which rank holds which experts. No torch.

For the optimizer every rank is a data-parallel rank (it has tokens of its own). Expert parallelism groups consecutive
ranks: ranks ``[k * ep, (k + 1) * ep)`` together hold one full set of experts (the expert-parallel group), and
ranks with equal ``rank % ep`` hold the same experts (the expert-data-parallel group). Context parallelism groups
consecutive ranks too, whatever the expert-parallel size, and so does tensor parallelism, inside of it: ranks
``[k * cp * tp, (k + 1) * cp * tp)`` have the k-th share of the rows, and of each of these rows one part each. Runs of
``tp`` ranks among them divide the mixers' heads, each for the tokens of all of the run; where there are fewer heads of
a kind than ranks, neighbours have the same one.
"""

from __future__ import annotations

from collections.abc import Callable
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
        context_parallel_size: slices of a row.
        tensor_parallel_size: ranks that share the mixers' heads and a slice of a row; its product with the slices
            divides ``world_size``.

    Raises:
        ConfigError: when a size does not divide ``world_size``.
    """

    world_size: int = 1
    rank: int = 0
    expert_parallel_size: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("expert_parallel_size", "context_parallel_size", "tensor_parallel_size"):
            size = getattr(self, name)
            if self.world_size % size:
                raise ConfigError(
                    f"parallel.{name}: {size} does not divide the world size {self.world_size}; "
                    f"{what_divides(self.world_size, size)}"
                )
        if self.world_size % self.ranks_per_row:
            raise ConfigError(
                f"parallel.tensor_parallel_size: {self.tensor_parallel_size} x parallel.context_parallel_size "
                f"{self.context_parallel_size} does not divide the world size {self.world_size}; for their product "
                f"{what_divides(self.world_size, self.ranks_per_row)}"
            )

    @property
    def ranks_per_row(self) -> int:
        """Ranks that share the tokens of a row."""
        return self.context_parallel_size * self.tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Shares that the rows of a step are divided into."""
        return self.world_size // self.ranks_per_row

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the rows this rank has, or a part of."""
        return self.rank // self.ranks_per_row

    @property
    def context_parallel_rank(self) -> int:
        """Which slice of its rows this rank's tensor group has."""
        return self.rank % self.ranks_per_row // self.tensor_parallel_size

    @property
    def tensor_parallel_rank(self) -> int:
        """Which of the mixers' heads this rank has, and which part of the slice."""
        return self.rank % self.tensor_parallel_size

    @property
    def row_groups(self) -> list[range]:
        """The ranks that share rows, every group in order of its parts of a row."""
        size = self.ranks_per_row
        return [range(first, first + size) for first in range(0, self.world_size, size)]

    @property
    def context_parallel_groups(self) -> list[range]:
        """The ranks with the same heads among those that share rows, every group in order of its slices."""
        size = self.tensor_parallel_size
        return [range(first, ranks.stop, size) for ranks in self.row_groups for first in ranks[:size]]

    @property
    def tensor_parallel_groups(self) -> list[range]:
        """The ranks that divide heads, every group in order of their heads."""
        return self.head_sets(self.tensor_parallel_size)

    def head_shares(self, num_heads: int) -> int:
        """Equal shares that so many heads are divided into; several ranks of a tensor group have the same one head."""
        return min(num_heads, self.tensor_parallel_size)

    def head_share(self, num_shares: int) -> int:
        """Which of ``num_shares`` shares of heads this rank has."""
        return self.tensor_parallel_rank * num_shares // self.tensor_parallel_size

    def head_sets(self, num_shares: int) -> list[range]:
        """Groups of ranks that together have each of ``num_shares`` shares once, in order of the shares."""
        size = self.tensor_parallel_size
        step = size // num_shares
        firsts = (first + offset for first in range(0, self.world_size, size) for offset in range(step))
        return [range(first, first // size * size + size, step) for first in firsts]

    def head_holders(self, num_shares: int) -> list[list[int]]:
        """By share, the ranks that have it, in order."""
        size = self.tensor_parallel_size
        everyone = range(self.world_size)
        return [[rank for rank in everyone if rank % size * num_shares // size == share] for share in range(num_shares)]

    @property
    def expert_parallel_rank(self) -> int:
        """Position inside the expert-parallel group."""
        return self.rank % self.expert_parallel_size

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


def what_divides(world_size: int, size: int, fits: Callable[[int], bool] = lambda divisor: True) -> str:
    """What to do about a size that does not divide the number of processes.

    Args:
        world_size: number of processes.
        size: what does not divide it.
        fits: whether another size would be accepted; of none that divides it nothing is said.
    """
    fitting = [str(divisor) for divisor in range(1, world_size + 1) if world_size % divisor == 0 and fits(divisor)]
    choose = f"choose {'one of ' if len(fitting) > 1 else ''}{', '.join(fitting)} or " if fitting else ""
    return f"{choose}start a multiple of {size} processes"
