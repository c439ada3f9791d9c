from qwen3next_train.accounting.memory import stage3_limits
from qwen3next_train.config.schema import Config, OptimizerConfig, ParallelConfig, RunConfig
from qwen3next_train.engine.deepspeed_config import deepspeed_config
from tests.unit.accounting.shapes import TINY


def test_the_whole_dictionary_is_what_deepspeed_is_given() -> None:
    config = Config(
        run=RunConfig(micro_batch_size=2, global_batch_size=16),
        optimizer=OptimizerConfig(clip_grad=0.0),
        parallel=ParallelConfig(zero_stage=1),
    )
    assert deepspeed_config(config, num_passes=4, in_buckets=False) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        # Written although it is 0: left out it would mean 1.0.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_of_buckets_deepspeed_knows_the_first_stage_only() -> None:
    stages = {
        (stage, in_buckets): deepspeed_config(
            Config(parallel=ParallelConfig(zero_stage=stage)), num_passes=1, in_buckets=in_buckets
        )["zero_optimization"]["stage"]
        for stage, in_buckets in ((1, True), (2, True), (2, False), (3, False))
    }
    assert stages == {(1, True): 1, (2, True): 1, (2, False): 2, (3, False): 3}


def test_stage_3_gathers_a_layer_ahead_within_limits() -> None:
    config = Config(model=TINY, parallel=ParallelConfig(zero_stage=3, expert_parallel_size=2))
    found = deepspeed_config(config, num_passes=1, in_buckets=False)["zero_optimization"]
    limits = stage3_limits(TINY, expert_parallel_size=2, tensor_parallel_size=1)
    assert {key: value for key, value in found.items() if key.startswith("stage3_")} == {
        "stage3_param_persistence_threshold": 128,
        "stage3_max_reuse_distance": limits.reuse,
        "stage3_max_live_parameters": limits.live,
        "stage3_prefetch_bucket_size": limits.layer,
    }
    assert found["contiguous_gradients"] is False


def test_an_offloaded_optimizer_lives_in_pinned_host_memory() -> None:
    config = Config(parallel=ParallelConfig(offload_optimizer="cpu"))
    found = deepspeed_config(config, num_passes=1, in_buckets=False)["zero_optimization"]
    assert found["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
