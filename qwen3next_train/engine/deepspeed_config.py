"""The DeepSpeed configuration of a run, as a pure function of ours. DeepSpeed is not imported here.

Users never write DeepSpeed JSON: DeepSpeed accepts unknown and ill-typed keys silently, so everything is
validated by our schema and generated.
"""

from __future__ import annotations

from typing import Any

from qwen3next_train.accounting.memory import REDUCE_BUCKET_NUMEL, persistent_numel, stage3_limits
from qwen3next_train.config.schema import Config


def deepspeed_config(config: Config, *, num_passes: int, in_buckets: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary.

    DeepSpeed's own ``bf16`` mode stays off because it would cast every parameter, the fp32 router, ``A_log``
    and ``dt_bias`` included (DeepSpeed issue 7747): the model arrives already cast. Gradients are then
    accumulated and reduced in fp32. ``gradient_clipping`` is always written, since its absence means 1.0. An offloaded
    optimizer is ours like any other: DeepSpeed's CPU optimizer would be compiled at first use.

    Args:
        config: the resolved configuration.
        num_passes: forward-backward passes per optimizer step on each rank, at most.
        in_buckets: gradients are summed and reduced by ``engine.gradient_buckets``; DeepSpeed is told of stage 1 then,
            whichever it is.
    """
    zero: dict[str, Any] = {
        "stage": 1 if in_buckets else config.parallel.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": REDUCE_BUCKET_NUMEL,
        "allgather_bucket_size": REDUCE_BUCKET_NUMEL,
    }
    if config.parallel.zero_stage == 3:
        limits = stage3_limits(
            config.model,
            expert_parallel_size=config.parallel.expert_parallel_size,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
        )
        zero |= {
            "stage3_param_persistence_threshold": persistent_numel(config.model),
            "stage3_max_reuse_distance": limits.reuse,
            "stage3_max_live_parameters": limits.live,
            # The whole next layer travels while one computes.
            "stage3_prefetch_bucket_size": limits.layer,
            # Gradients wait in their bucket where they are, and are copied once: to what is sent.
            "contiguous_gradients": False,
        }
    if config.parallel.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": config.run.micro_batch_size,
        "gradient_accumulation_steps": num_passes,
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": None,
        # It waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
