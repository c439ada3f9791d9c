"""How large a model is and what one optimizer step of it costs: the figures that ``plan`` and ``run.json`` share."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from qwen3next_train.accounting.flops import TRAINING_PASSES, forward_flops
from qwen3next_train.accounting.megatron_flops import megatron_training_flops
from qwen3next_train.config.schema import Config, ModelConfig
from qwen3next_train.parameters import parameter_table


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Args:
        total: all, MTP included.
        active: used by a token in the decoder: everything but MTP and the experts it is not sent to; both
            embeddings included.
        by_part: all, by part; MTP depths are one part.
    """

    total: int
    active: int
    by_part: dict[str, int]


@dataclass(frozen=True)
class Workload:
    """A model's size and the work of one step on full rows, every row taken as one document.

    Args:
        parameters: numbers of parameters.
        num_tokens: tokens of the global batch.
        flops_by_part: training FLOPs per step, exact.
        flops_megatron: the same step in Megatron-LM's convention.
    """

    parameters: Parameters
    num_tokens: int
    flops_by_part: dict[str, int]
    flops_megatron: float

    @property
    def flops_per_step(self) -> int:
        """Training FLOPs of the global batch."""
        return sum(self.flops_by_part.values())

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, a whole number because every row counts as one document."""
        return self.flops_per_step // self.num_tokens

    def as_json(self) -> dict[str, Any]:
        """The documented JSON object: ``parameters``, ``flops`` and ``flops_megatron``."""
        return {
            "parameters": {
                "total": self.parameters.total,
                "active": self.parameters.active,
                "by_part": self.parameters.by_part,
            },
            "flops": {
                "per_token": self.flops_per_token,
                "per_step": self.flops_per_step,
                "by_part": self.flops_by_part,
            },
            "flops_megatron": {"per_step": self.flops_megatron},
        }


def workload_of(config: Config) -> Workload:
    """Size and work of a resolved configuration."""
    length = config.data.sequence_length
    num_tokens = config.run.global_batch_size * length
    squared = num_tokens * length
    forward = forward_flops(config.model, num_tokens=num_tokens, sum_squared_lengths=squared)
    return Workload(
        parameters=count_parameters(config.model),
        num_tokens=num_tokens,
        flops_by_part={part: TRAINING_PASSES * count for part, count in forward.items()},
        flops_megatron=megatron_training_flops(config.model, num_tokens=num_tokens, sum_squared_lengths=squared),
    )


def count_parameters(model: ModelConfig) -> Parameters:
    """Numbers of parameters from the parameter table."""
    by_part: defaultdict[str, int] = defaultdict(int)
    for spec in parameter_table(model):
        by_part["mtp" if spec.name.startswith("mtp.") else spec.part] += spec.numel
    total = sum(by_part.values())
    idle_experts = by_part["experts"] // model.num_experts * (model.num_experts - model.num_experts_per_tok)
    return Parameters(total, total - by_part["mtp"] - idle_experts, dict(by_part))
