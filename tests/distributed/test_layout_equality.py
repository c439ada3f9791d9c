"""The same global batch gives the same gradients and the same curve at every layout (fp32, CPU)."""

from pathlib import Path

import pytest

from qwen3next_train.config.schema import Config, ParallelConfig
from tests.distributed.layouts import Job, largest_relative_error, train_all

pytestmark = pytest.mark.dist


def small_config(
    *, micro_batch_size: int = 1, steps: int = 1, clip_grad: float = 0.0, scope: str = "sequence"
) -> Config:
    return Config.model_validate(
        {
            "run": {
                "steps": steps,
                "precision": "fp32",
                "global_batch_size": 4,
                "micro_batch_size": micro_batch_size,
            },
            "model": {
                "vocab_size": 97,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 12,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 24,
                "router_aux_loss_coef": 0.01,
                "router_aux_loss_scope": scope,
                "router_z_loss_coef": 0.001,
            },
            "data": {"sequence_length": 48},
            # Adam takes a step of full size even where a gradient is nothing but rounding, in a direction that
            # differs between layouts; an eps above the rounding leaves those elements where they are.
            "optimizer": {"lr": 3e-3, "eps": 1e-5, "clip_grad": clip_grad},
            "schedule": {"kind": "constant", "warmup_steps": 0, "min_lr": 0.0},
        }
    )


def test_gradients_are_those_of_one_rank_with_four_micro_batches(tmp_path: Path) -> None:
    whole = small_config(micro_batch_size=4)
    split = small_config(micro_batch_size=1)
    zero_2 = split.model_copy(update={"parallel": ParallelConfig(zero_stage=2)})
    reference, one = train_all([Job(split), Job(whole)], tmp_path / "1", num_processes=1)
    jobs = [Job(split), Job(small_config(micro_batch_size=2)), Job(zero_2)]
    for outcome in (one, *train_all(jobs, tmp_path / "2", num_processes=2)):
        # After one step from zero, exp_avg is (1 - beta1) times the gradient.
        error, name = largest_relative_error(reference, outcome, "exp_avg")
        assert error < 1e-6, name
        expected, found = reference.metrics[0], outcome.metrics[0]
        for metric in ("loss/lm", "loss/mtp", "loss/load_balancing", "loss/z", "loss/total", "optim/grad_norm"):
            assert found[metric] == pytest.approx(expected[metric], rel=1e-6), metric


def test_one_micro_batch_per_rank_gives_the_curve_of_one_rank(tmp_path: Path) -> None:
    """Also where the load-balancing loss counts over more than a row."""

    def jobs(micro_batch_size: int) -> list[Job]:
        scopes = ("sequence", "micro_batch", "global")
        settings = {"micro_batch_size": micro_batch_size, "steps": 4, "clip_grad": 0.5}
        return [Job(small_config(**settings, scope=scope)) for scope in scopes]

    outcomes = [train_all(jobs(4 // ranks), tmp_path / str(ranks), num_processes=ranks) for ranks in (1, 2)]
    for one, two in zip(*outcomes, strict=True):
        for expected, found in zip(one.metrics, two.metrics, strict=True):
            for metric, value in expected.items():
                assert found[metric] == pytest.approx(value, rel=1e-5), metric
        error, name = largest_relative_error(one, two, "master")
        assert error < 1e-5, name
