"""What tensor parallelism divides, as DeepSpeed's ZeRO has to see it: experts of a group of their own.

ZeRO partitions and reduces a parameter over all ranks, or as an expert over those that hold the same experts. A rank's
heads are held by ranks of the other tensor groups, and of its own where these outnumber the heads, so that their
parameters carry the marks of experts with names of further groups. ``gradient_buckets.bucketed_groups`` keeps the
optimizer groups of each apart, in one order on all ranks.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from qwen3next_train.parameters import ParamSpec
from qwen3next_train.topology import Topology


def mark_divided_parameters(
    model: nn.Module, table: Sequence[ParamSpec], topology: Topology, *, timeout_s: float
) -> None:
    """Make the groups once and tag every divided parameter; to be called once the parameters are materialised.

    Args:
        model: whose parameter names are the table's.
        table: the parameter table.
        topology: this rank's place.
        timeout_s: how long to wait for another rank before it counts as lost.
    """
    size = topology.tensor_parallel_size
    if size == 1:
        return
    parameters = dict(model.named_parameters())
    for spec in table:
        if spec.heads is not None:
            num_shares = topology.head_shares(spec.heads.count)
            # Of one share the parameter is the same on all ranks.
            if num_shares > 1:
                mark_as_expert(parameters[spec.name], _group_name(topology, num_shares, timeout_s))


def _group_name(topology: Topology, num_shares: int, timeout_s: float) -> str:
    """Name of the ranks that have one share of heads, for whom groups are made when it is first asked for."""
    name = f"tensor_size_{topology.tensor_parallel_size}_shares_{num_shares}"
    if name not in groups._get_expert_parallel_group_dict():
        timeout = datetime.timedelta(seconds=timeout_s)
        one_of_each, the_same = groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP
        ranks_of_one, ranks_of_same = groups._EXPERT_PARALLEL_GROUP_RANKS, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS
        for all_ranks, made, made_of in (
            (topology.head_sets(num_shares), one_of_each, ranks_of_one),
            (topology.head_holders(num_shares), the_same, ranks_of_same),
        ):
            for ranks in all_ranks:
                group = dist.new_group(list(ranks), timeout=timeout)
                if topology.rank in ranks:
                    made[name], made_of[name] = group, list(ranks)
    return name


def mark_as_expert(parameter: nn.Parameter, group_name: str) -> None:
    """Tag a parameter with the group by whose name DeepSpeed knows the ranks that hold it."""
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = group_name  # type: ignore[attr-defined]
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]
