"""The expert layer as DeepSpeed's ZeRO has to see it.

ZeRO treats parameters as experts only inside a module that is an ``AutoEPMoELayer`` by ``isinstance``: marks
on the parameters alone fail under stages 1 and 2 and are silently wrong under stage 3, where one rank's
experts overwrite another's. Nothing of that class but its type is used: routing, dispatch and expert
products are ``SparseMoeBlock``'s.
"""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.parallel.expert_parallel import AllToAllDispatcher


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
            group = groups._get_expert_parallel_group(self.ep_group_name)
            assert dist.get_rank(group) == self.ep_rank, "DeepSpeed's expert-parallel ranks are not consecutive"
            self.dispatcher = AllToAllDispatcher(group, self.num_experts, self._permutation)


def mark_expert_parameters(model: nn.Module) -> None:
    """Tag every expert parameter with its group; to be called once the parameters are materialised."""
    for block in model.modules():
        if isinstance(block, ZeroMoeBlock):
            for parameter in block.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = block.ep_group_name  # type: ignore[attr-defined]
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = block.ep_group_name  # type: ignore[attr-defined]
