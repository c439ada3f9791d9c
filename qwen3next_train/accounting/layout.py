"""How a run is spread over GPUs and what it keeps there, as far as memory and traffic depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.config.schema import Config, GradientDtype, MomentsDtype, RecomputePart, TokenExchange
from qwen3next_train.topology import RANKS_PER_NODE

FP32_BYTES = 4
"""Of masters, moments, gradients and everything computed in fp32."""
MAX_DENSE_RANKS = 4
"""Expert-parallel ranks up to which all tokens go to all ranks: with 10 of 512 experts 6 % more rows than needed."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread over GPUs and what it keeps there.

    Args:
        world_size: GPUs, one process each.
        expert_parallel_size: ranks that share one set of experts.
        zero_stage: 1, 2 or 3.
        precision: dtype of weights and activations.
        micro_batch_size: rows per rank and forward pass.
        sequence_length: tokens per row.
        recompute: what the backward pass computes again instead of keeping it.
        moments_dtype: dtype of Adam's two moments.
        offload_optimizer: master weights and moments live in host memory.
        gradient_dtype: what gradients of weights in ``precision`` are summed in, in buckets.
        token_exchange: which tokens travel to other ranks' experts.
        micro_batches_in_flight: micro-batches that pass through the model together.
        ranks_per_node: consecutive ranks that share a machine, or a domain of fast links.
        context_parallel_size: slices of a row.
        tensor_parallel_size: ranks that divide the mixers' heads and share a slice.
    """

    world_size: int
    expert_parallel_size: int
    zero_stage: Literal[1, 2, 3]
    precision: Precision
    micro_batch_size: int
    sequence_length: int
    recompute: frozenset[RecomputePart] = frozenset()
    moments_dtype: MomentsDtype = "fp32"
    offload_optimizer: bool = False
    gradient_dtype: GradientDtype = "fp32"
    token_exchange: TokenExchange = "exact"
    micro_batches_in_flight: int = 1
    ranks_per_node: int = RANKS_PER_NODE
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1

    @classmethod
    def of(cls, config: Config, world_size: int, *, ranks_per_node: int = RANKS_PER_NODE) -> Layout:
        """The layout of a configuration on ``world_size`` GPUs, ``ranks_per_node`` of them in a machine."""
        return cls(
            world_size=world_size,
            expert_parallel_size=config.parallel.expert_parallel_size,
            zero_stage=config.parallel.zero_stage,
            precision=config.run.precision,
            micro_batch_size=config.run.micro_batch_size,
            sequence_length=config.data.sequence_length,
            recompute=frozenset(config.parallel.recompute),
            moments_dtype=config.optimizer.moments_dtype,
            offload_optimizer=config.parallel.offload_optimizer == "cpu",
            gradient_dtype=config.parallel.gradient_dtype,
            token_exchange=config.parallel.token_exchange,
            micro_batches_in_flight=config.parallel.micro_batches_in_flight,
            ranks_per_node=ranks_per_node,
            context_parallel_size=config.parallel.context_parallel_size,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return bytes_of(self.precision)

    @property
    def sums_in_buckets(self) -> bool:
        """Whether gradients are summed in the buffers they are reduced from (``engine.gradient_buckets``)."""
        return self.zero_stage < 3 and not self.offload_optimizer

    @property
    def updates_in_one_pass(self) -> bool:
        """Whether AdamW clips, skips and rounds by itself and reads gradients where they were summed."""
        return self.zero_stage == 3 or self.sums_in_buckets

    @property
    def exchanges_densely(self) -> bool:
        """Whether all tokens travel to all ranks that share a set of experts (``parallel.expert_parallel``)."""
        size = self.expert_parallel_size
        if size == 1 or self.token_exchange != "auto":
            return size > 1 and self.token_exchange == "dense"
        return size <= MAX_DENSE_RANKS and self.shares_experts_in_a_node

    @property
    def shares_experts_in_a_node(self) -> bool:
        """Whether all ranks that share a set of experts are of one node."""
        return self.world_size <= self.ranks_per_node or self.ranks_per_node % self.expert_parallel_size == 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch_size * self.sequence_length // self.ranks_per_row

    @property
    def ranks_per_row(self) -> int:
        """Ranks that share the tokens of a row."""
        return self.context_parallel_size * self.tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of ranks, with rows of their own."""
        return self.world_size // self.ranks_per_row

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches of a rank and step."""
        return global_batch_size // (self.data_parallel_size * self.micro_batch_size)


def bytes_of(precision: Precision) -> int:
    """Bytes of one element."""
    return 2 if precision == "bf16" else FP32_BYTES
