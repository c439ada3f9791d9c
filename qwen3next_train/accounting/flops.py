"""Model FLOPs of what is really built, exactly and by part.

Convention: 2 FLOPs per multiply-add; matrix products, the causal convolution and the delta rule count; norms,
element-wise work, softmax and RoPE do not; causal attention counts half of each document's square; the delta
rule counts in its recurrent form (the chunked kernels do more, which is not model work); recomputation never
counts; training is three times the forward pass. :mod:`qwen3next_train.accounting.megatron_flops` gives
Megatron-LM's figure for the same step, which differs in known places.
"""

from __future__ import annotations

from qwen3next_train.config.schema import ModelConfig

FLOPS_PER_MULTIPLY_ADD = 2
TRAINING_PASSES = 3
"""One forward product becomes three in training: forward, gradient of the input, gradient of the weight."""
PARTS_OUTSIDE_LAYERS = frozenset({"head", "mtp_head", "mtp_fc"})
"""What recomputing whole layers does not do again."""


def forward_flops(model: ModelConfig, *, num_tokens: int, sum_squared_lengths: int) -> dict[str, int]:
    """FLOPs of one forward pass over a batch, by part.

    Args:
        model: shape of the model; ``layer_types`` lists every decoder layer.
        num_tokens: tokens of the batch (every position is computed, targets or not).
        sum_squared_lengths: sum over document pieces of their squared length, in tokens squared; one
            document per row gives ``rows * sequence_length ** 2``.

    Returns:
        Exact FLOPs by part. Parts of the MTP depths begin with ``mtp_``; parts that the model lacks are 0.
    """
    gdn_layers, attention_layers = count_mixers(model)
    depths = model.mtp_num_layers
    per_token = {
        **_scaled(_gdn(model), gdn_layers),
        **_scaled(_attention_projections(model), attention_layers),
        **_scaled(_moe(model), model.num_hidden_layers),
        **_scaled(_head(model), 1),
        **_scaled({"fc": 2 * model.hidden_size**2}, depths, prefix="mtp_"),
        **_scaled(_attention_projections(model), depths, prefix="mtp_"),
        **_scaled(_moe(model), depths, prefix="mtp_"),
        **_scaled(_head(model), depths, prefix="mtp_"),
    }
    flops = {part: FLOPS_PER_MULTIPLY_ADD * num_tokens * count for part, count in per_token.items()}
    # Two products (QK^T and PV) of query_dim multiply-adds per visible pair, and half the pairs are visible.
    scores = FLOPS_PER_MULTIPLY_ADD * sum_squared_lengths * query_dim(model)
    flops["attention_scores"] = scores * attention_layers
    flops["mtp_attention_scores"] = scores * depths
    return flops


def training_flops(model: ModelConfig, *, num_tokens: int, sum_squared_lengths: int) -> int:
    """FLOPs of forward and backward over a batch; arguments as for :func:`forward_flops`."""
    forward = forward_flops(model, num_tokens=num_tokens, sum_squared_lengths=sum_squared_lengths)
    return TRAINING_PASSES * sum(forward.values())


def count_mixers(model: ModelConfig) -> tuple[int, int]:
    """Number of Gated DeltaNet layers and of softmax layers among the decoder layers (MTP not counted)."""
    assert len(model.layer_types) == model.num_hidden_layers, "layer_types is resolved when a configuration is loaded"
    attention_layers = model.layer_types.count("full_attention")
    return model.num_hidden_layers - attention_layers, attention_layers


def query_dim(model: ModelConfig) -> int:
    """Width of the queries of a softmax layer."""
    return model.num_attention_heads * model.head_dim


def gdn_dims(model: ModelConfig) -> tuple[int, int]:
    """Width of all keys (and of all queries) and of all values of a Gated DeltaNet layer."""
    return (
        model.linear_num_key_heads * model.linear_key_head_dim,
        model.linear_num_value_heads * model.linear_value_head_dim,
    )


def _scaled(multiply_adds: dict[str, int], layers: int, prefix: str = "") -> dict[str, int]:
    return {prefix + part: layers * count for part, count in multiply_adds.items()}


def _gdn(model: ModelConfig) -> dict[str, int]:
    """Multiply-adds per token of one Gated DeltaNet layer."""
    key_dim, value_dim = gdn_dims(model)
    value_heads = model.linear_num_value_heads
    columns = 2 * key_dim + 2 * value_dim + 2 * value_heads
    return {
        "gdn_projections": model.hidden_size * (columns + value_dim),
        "gdn_conv": model.linear_conv_kernel_dim * (2 * key_dim + value_dim),
        # Per head: S k, its outer product with k, the write v k^T and the read S q.
        "gdn_delta_rule": 4 * value_heads * model.linear_key_head_dim * model.linear_value_head_dim,
    }


def _attention_projections(model: ModelConfig) -> dict[str, int]:
    """Multiply-adds per token of the projections of one softmax layer."""
    queries = query_dim(model) * (2 if model.attention_output_gate else 1)
    keys_and_values = 2 * model.num_key_value_heads * model.head_dim
    return {"attention_projections": model.hidden_size * (queries + keys_and_values + query_dim(model))}


def _moe(model: ModelConfig) -> dict[str, int]:
    """Multiply-adds per token of one MoE block; a SwiGLU expert is three products."""
    hidden, shared = model.hidden_size, model.shared_expert_intermediate_size
    return {
        "router": hidden * model.num_experts,
        "routed_experts": 3 * hidden * model.moe_intermediate_size * model.num_experts_per_tok,
        "shared_expert": 3 * hidden * shared,
        "shared_expert_gate": hidden if shared and model.shared_expert_gate else 0,
    }


def _head(model: ModelConfig) -> dict[str, int]:
    return {"head": model.hidden_size * model.vocab_size}
