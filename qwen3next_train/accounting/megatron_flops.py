"""Megatron-LM's FLOPs of a training step, to the last digit, so that our figures compare with published ones.

Reproduces ``num_floating_point_operations`` of ``megatron/training/training.py`` (GPT path with
``--experimental-attention-variant gated_delta_net``; PR 1989 and main of August 2026 agree). It differs from
what is built, and from :mod:`qwen3next_train.accounting.flops`, in these places:

* ``--linear-attention-freq N`` is stretched over decoder and MTP layers together, so an MTP layer, which is
  always softmax attention, counts as whatever comes next in the pattern (Gated DeltaNet for 48 layers, N = 4).
* The delta rule's state is value_dim x value_dim instead of key_dim x value_dim.
* Router and shared-expert gate are left out; three norms of each MTP depth are counted.
* The number is a float, because the attention scores are computed with a division.
"""

from __future__ import annotations

from qwen3next_train.accounting.flops import FLOPS_PER_MULTIPLY_ADD, TRAINING_PASSES, gdn_dims, query_dim
from qwen3next_train.config.schema import LayerType, ModelConfig
from qwen3next_train.config.validate import expand_interval

_FACTOR = TRAINING_PASSES * FLOPS_PER_MULTIPLY_ADD


def megatron_training_flops(
    model: ModelConfig, *, num_tokens: int, sum_squared_lengths: int, list_pattern: bool = False
) -> float:
    """Megatron-LM's FLOPs of one training step.

    Args:
        model: shape of the model; ``vocab_size`` is taken as Megatron's padded vocabulary.
        num_tokens: real tokens of the step over all ranks.
        sum_squared_lengths: sum over document pieces of their squared length.
        list_pattern: the layer pattern is given to Megatron as a list. Also assumed when ``layer_types`` is
            not the pattern of ``full_attention_interval``, which only a list can express.

    Returns:
        FLOPs, equal to Megatron's return value. Where Megatron fails, a list together with MTP layers
        (``Invalid length of linear_attention_pattern``), every MTP layer counts as the last decoder layer's
        kind, as Megatron-Bridge does (PR 4834).
    """
    pattern = _mixer_pattern(model, list_pattern=list_pattern)
    gdn_layers, attention_layers = pattern.count("linear_attention"), pattern.count("full_attention")
    depths, hidden = model.mtp_num_layers, model.hidden_size
    experts = model.moe_intermediate_size * model.num_experts_per_tok + model.shared_expert_intermediate_size
    per_token = (
        hidden * 3 * experts * len(pattern)
        + _gdn(model) * gdn_layers
        + _attention_projections(model) * attention_layers
        + depths * (3 * hidden + 2 * hidden * hidden)
        + hidden * model.vocab_size * (depths + 1)
    )
    # Float from here on, in Megatron's order of operations: the last digit depends on it.
    scores = _FACTOR * query_dim(model) / 2 * 2 * attention_layers
    return num_tokens * _FACTOR * per_token + sum_squared_lengths * scores


def _mixer_pattern(model: ModelConfig, *, list_pattern: bool) -> list[LayerType]:
    """The mixer that Megatron counts for every decoder and MTP layer."""
    assert len(model.layer_types) == model.num_hidden_layers, "layer_types is resolved when a configuration is loaded"
    num_layers = model.num_hidden_layers + model.mtp_num_layers
    by_interval = expand_interval(model.full_attention_interval, num_layers)
    if not list_pattern and by_interval[: model.num_hidden_layers] == model.layer_types:
        return by_interval
    return model.layer_types + model.layer_types[-1:] * model.mtp_num_layers


def _gdn(model: ModelConfig) -> int:
    key_dim, value_dim = gdn_dims(model)
    value_heads = model.linear_num_value_heads
    return (
        model.hidden_size * (2 * key_dim + 2 * value_dim + 2 * value_heads)
        + model.linear_conv_kernel_dim * (2 * key_dim + value_dim)
        + value_heads * model.linear_value_head_dim**2 * 4
        + model.hidden_size * value_dim
    )


def _attention_projections(model: ModelConfig) -> int:
    queries = query_dim(model)
    gate = queries if model.attention_output_gate else 0
    keys_and_values = 2 * model.num_key_value_heads * model.head_dim
    return model.hidden_size * (queries + keys_and_values + gate) + queries * model.hidden_size
