"""The model against transformers' implementation, which shares no code with it."""

from __future__ import annotations

import pytest

from tests.unit.model.huggingface_parity import ParityCase, parity_errors

CASES = {
    "small hybrid": ParityCase({}),
    "one linear layer, short": ParityCase({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, length=5),
    "one softmax layer": ParityCase({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, length=33, seed=1),
    "four layers, value dim < key dim": ParityCase(
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_key_head_dim": 24,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 3,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e4,
        },
        length=130,
        seed=2,
    ),
    "plain top-k, tied": ParityCase(
        {"norm_topk_prob": False, "tie_word_embeddings": True, "num_experts_per_tok": 3}, num_rows=3, seed=3
    ),
    "one expert each, equal heads": ParityCase(
        {"num_experts_per_tok": 1, "linear_num_value_heads": 2, "num_key_value_heads": 4, "norm_topk_prob": False},
        seed=4,
    ),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    return dict(zip(CASES, parity_errors(list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", list(CASES))
def test_logits_loss_and_every_gradient_equal_transformers(errors: dict[str, dict[str, float]], case: str) -> None:
    worst = max(errors[case], key=lambda name: errors[case][name])
    assert len(errors[case]) > 10
    assert errors[case][worst] <= TOLERANCE, f"{worst}: {errors[case][worst]:.2e}"
