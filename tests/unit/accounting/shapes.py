"""Model shapes the accounting and planner tests share."""

from __future__ import annotations

from qwen3next_train.config.schema import LayerType, ModelConfig

PATTERN_80B: list[LayerType] = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12
QWEN3_NEXT_80B = ModelConfig(layer_types=PATTERN_80B)
QWEN3_NEXT_80B_WITHOUT_MTP = ModelConfig(layer_types=PATTERN_80B, mtp_num_layers=0)

# Small enough to count by hand; key and value dims differ so that no formula can mix them up.
TINY = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    linear_conv_kernel_dim=2,
    linear_key_head_dim=3,
    linear_value_head_dim=5,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"],
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=7,
    mtp_num_layers=1,
)
