"""How long the collectives of DeepSpeed's own process groups wait for a rank."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from deepspeed.utils import groups


def set_group_timeouts(timeout_s: float) -> None:
    """Let the groups that DeepSpeed has made give up after ``timeout_s`` seconds.

    It makes them with torch's defaults (10 minutes for NCCL, 30 for gloo) and has no setting for it. To be called
    once it has made them all.
    """
    made = [
        groups._get_data_parallel_group(),
        *groups._get_expert_parallel_group_dict().values(),
        *groups._get_expert_data_parallel_group_dict().values(),
    ]
    for group in made:
        # A rank outside of a group holds a placeholder.
        if isinstance(group, dist.ProcessGroup):
            group.set_timeout(timedelta(seconds=timeout_s))
