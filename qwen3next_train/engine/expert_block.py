"""The expert layer as DeepSpeed's ZeRO has to see it.

ZeRO treats parameters as experts only inside a module that is an ``AutoEPMoELayer`` by ``isinstance``: marks
on the parameters alone fail under stages 1 and 2 and are silently wrong under stage 3, where one rank's
experts overwrite another's. Nothing of that class but its type is used: routing, dispatch and expert
products are ``SparseMoeBlock``'s.
"""

from __future__ import annotations

from typing import Self

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.engine.divided_parameters import mark_as_expert
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.dispatch import TokenDispatcher
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.parallel.expert_parallel import AllToAllDispatcher, DenseDispatcher, ExpertRoom


class ZeroMoeBlock(SparseMoeBlock, AutoEPMoELayer):
    """A ``SparseMoeBlock`` whose experts ZeRO reduces over the expert-data-parallel group.

    Args:
        config: model section.
        kernels: selected backends.
        local_experts: global ids of the experts of this rank, contiguous and of equal number on every rank.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, local_experts: range) -> None:
        # AutoEPMoELayer's own constructor repacks a Hugging Face block; it must not run.
        SparseMoeBlock.__init__(self, config, kernels, local_experts)
        self.num_experts = config.num_experts
        self.num_local_experts = len(local_experts)
        self.ep_size = config.num_experts // len(local_experts)
        self.ep_rank = local_experts.start // len(local_experts)
        self.ep_group_name = f"ep_size_{self.ep_size}"
        self._permutation = kernels.token_permutation
        self._in_training: TokenDispatcher | None = None
        self._in_evaluation: TokenDispatcher | None = None

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: object | None = None
    ) -> None:
        """Create the expert groups once and dispatch tokens over them; DeepSpeed calls this on every expert layer."""
        del folding_group_handles
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        if self.ep_size > 1:
            assert dist.get_rank(self.ep_group) == self.ep_rank, "DeepSpeed's expert-parallel ranks are not consecutive"
            self.dispatcher = AllToAllDispatcher(self.ep_group, self.num_experts, self._permutation)

    @property
    def ep_group(self) -> dist.ProcessGroup:
        """Ranks that share one set of experts, once DeepSpeed has made them."""
        group: dist.ProcessGroup = groups._get_expert_parallel_group(self.ep_group_name)
        return group

    def dispatch_in_training(self, dispatcher: TokenDispatcher) -> None:
        """Dispatch by ``dispatcher`` in training and as until now in evaluation."""
        self._in_training, self._in_evaluation = dispatcher, self.dispatcher
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module, and choose the dispatcher."""
        super().train(mode)
        chosen = self._in_training if mode else self._in_evaluation
        if chosen is not None:
            self.dispatcher = chosen
        return self


def exchange_densely(model: nn.Module, room: ExpertRoom) -> None:
    """Let training send all tokens to all ranks of an expert-parallel group.

    Not so evaluation, where ranks may have different numbers of tokens.

    Args:
        model: whose expert layers know their groups.
        room: for the rows of a rank's experts.
    """
    blocks = [block for block in model.modules() if isinstance(block, ZeroMoeBlock)]
    first = blocks[0]
    dispatcher = DenseDispatcher(first.ep_group, first.num_experts, first._permutation, room)
    for block in blocks:
        block.dispatch_in_training(dispatcher)


def mark_expert_parameters(model: nn.Module) -> None:
    """Tag every expert parameter with its group; to be called once the parameters are materialised."""
    for block in model.modules():
        if isinstance(block, ZeroMoeBlock):
            for parameter in block.experts.parameters():
                mark_as_expert(parameter, block.ep_group_name)
