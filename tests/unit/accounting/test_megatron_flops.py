"""Megatron-LM's figure. Golden values are return values of its own ``num_floating_point_operations``."""

from __future__ import annotations

import random

import pytest

from qwen3next_train.accounting.flops import training_flops
from qwen3next_train.accounting.megatron_flops import megatron_training_flops
from qwen3next_train.config.schema import LayerType, ModelConfig
from qwen3next_train.config.validate import expand_interval
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, QWEN3_NEXT_80B_WITHOUT_MTP, TINY

GOLDEN_DENSE = [
    (0, 4096, 256, 2.384428403785728e16),
    (1, 4096, 256, 2.629781417046835e16),
    (2, 4096, 256, 2.8751344303079424e16),
    (3, 4096, 256, 3.1204874435690496e16),
    (1, 262144, 4, 1.0609597006793933e17),
    (1, 32768, 64, 7.032855187370803e16),
    (0, 1, 1, 21532016640.0),
]
GOLDEN_TINY = [
    (4, 6, 0, (7, 3), 353184.0),
    (4, 7, 1, (7, 3), 473568.0),
    (5, 7, 3, (1, 63, 64, 65, 1000), 170878704.0),
    (3, 7, 2, (999, 1), 196224288.0),
    (1, 3, 1, (5,), 100080.0),
    (9, 4, 2, (5, 5, 5), 595440.0),
]


@pytest.mark.parametrize(("depths", "sequence", "rows", "expected"), GOLDEN_DENSE)
def test_80b_equals_megatron(depths: int, sequence: int, rows: int, expected: float) -> None:
    """Dense rows, equal to the last digit."""
    model = QWEN3_NEXT_80B.model_copy(update={"mtp_num_layers": depths})
    value = megatron_training_flops(model, num_tokens=rows * sequence, sum_squared_lengths=rows * sequence**2)
    assert isinstance(value, float)
    assert value == expected


def test_80b_published_figure() -> None:
    """MTP 1, sequence 4096, global batch 256."""
    value = megatron_training_flops(QWEN3_NEXT_80B, num_tokens=256 * 4096, sum_squared_lengths=256 * 4096**2)
    assert value == 2.629781417046835e16


@pytest.mark.parametrize(("interval", "layers", "depths", "packed", "expected"), GOLDEN_TINY)
def test_intervals_and_packing_equal_megatron(
    interval: int, layers: int, depths: int, packed: tuple[int, ...], expected: float
) -> None:
    """Intervals that do not divide the layers, MTP depths 0 to 3, packed documents."""
    model = TINY.model_copy(
        update={
            "num_hidden_layers": layers,
            "full_attention_interval": interval,
            "layer_types": expand_interval(interval, layers),
            "mtp_num_layers": depths,
        }
    )
    value = megatron_training_flops(
        model, num_tokens=sum(packed), sum_squared_lengths=sum(length**2 for length in packed)
    )
    assert value == expected


def test_list_pattern_counts_mtp_as_the_last_layer() -> None:
    """Megatron raises here; Megatron-Bridge's figure for 36 GDN + 13 softmax layers is the sensible one."""
    tokens, squares = 256 * 4096, 256 * 4096**2
    value = megatron_training_flops(QWEN3_NEXT_80B, num_tokens=tokens, sum_squared_lengths=squares, list_pattern=True)
    assert value == 2.634955993645056e16


def test_list_and_interval_agree_without_mtp() -> None:
    """The spelling of the pattern matters only through the MTP layers."""
    model = QWEN3_NEXT_80B_WITHOUT_MTP
    values = {
        megatron_training_flops(model, num_tokens=4096, sum_squared_lengths=4096**2, list_pattern=as_list)
        for as_list in (False, True)
    }
    assert len(values) == 1


def test_irregular_pattern_is_taken_as_a_list() -> None:
    """A pattern that no interval gives: the MTP layer follows the last layer, here GDN."""
    layer_types: list[LayerType] = ["full_attention", "linear_attention"]
    model = TINY.model_copy(update={"layer_types": layer_types})
    as_list = megatron_training_flops(model, num_tokens=10, sum_squared_lengths=100, list_pattern=True)
    assert megatron_training_flops(model, num_tokens=10, sum_squared_lengths=100) == as_list
    without = model.model_copy(update={"mtp_num_layers": 0})
    gdn = 8 * (6 + 20 + 4) + 2 * 16 + 4 * 2 * 25 + 8 * 10
    depth = 6 * 10 * (gdn + 3 * 8 * (12 + 7) + 3 * 8 + 2 * 64 + 88)
    assert as_list == depth + megatron_training_flops(
        without, num_tokens=10, sum_squared_lengths=100, list_pattern=True
    )


def test_differs_from_exact_only_in_the_documented_terms() -> None:
    """Random shapes: router, shared gate, MTP norms and the state's width explain the whole difference."""
    rng = random.Random(0)
    for _ in range(50):
        model = _random_model(rng)
        tokens, squares = rng.randint(1, 10**5), rng.randint(1, 10**7)
        state = 4 * model.linear_num_value_heads * model.linear_value_head_dim
        wide = model.linear_value_head_dim - model.linear_key_head_dim
        last_is_gdn = model.layer_types[-1] == "linear_attention"
        assert not last_is_gdn
        gate = 1 if model.shared_expert_gate and model.shared_expert_intermediate_size else 0
        blocks = model.num_hidden_layers + model.mtp_num_layers
        per_token = (
            model.layer_types.count("linear_attention") * state * wide
            - blocks * model.hidden_size * (model.num_experts + gate)
            + 3 * model.hidden_size * model.mtp_num_layers
        )
        exact = training_flops(model, num_tokens=tokens, sum_squared_lengths=squares)
        megatron = megatron_training_flops(model, num_tokens=tokens, sum_squared_lengths=squares, list_pattern=True)
        assert megatron == exact + 6 * tokens * per_token


def _random_model(rng: random.Random) -> ModelConfig:
    layers = rng.randint(1, 12)
    kinds: list[LayerType] = ["linear_attention", "full_attention"]
    pattern: list[LayerType] = [rng.choice(kinds) for _ in range(layers - 1)]
    key_heads = rng.randint(1, 4)
    return ModelConfig(
        vocab_size=rng.randint(10, 5000),
        hidden_size=rng.randint(1, 64),
        num_hidden_layers=layers,
        num_attention_heads=rng.randint(1, 8),
        num_key_value_heads=rng.randint(1, 4),
        head_dim=rng.randint(1, 33),
        linear_conv_kernel_dim=rng.randint(2, 5),
        linear_key_head_dim=rng.randint(1, 32),
        linear_value_head_dim=rng.randint(1, 32),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * rng.randint(1, 4),
        layer_types=[*pattern, "full_attention"],
        attention_output_gate=rng.random() < 0.5,
        num_experts=rng.randint(4, 64),
        num_experts_per_tok=rng.randint(1, 4),
        moe_intermediate_size=rng.randint(1, 64),
        shared_expert_intermediate_size=rng.choice([0, 17]),
        shared_expert_gate=rng.random() < 0.5,
        mtp_num_layers=rng.randint(0, 3),
    )
