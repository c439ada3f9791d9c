"""Where we differ from transformers on purpose (docs/decisions/0008): theirs measured, ours held to the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qwen3next_train.parameters import parameter_table
from tests.unit.model.small_models import small_config
from tests.unit.model.transformers_differences import measure

pytestmark = pytest.mark.slow

TOP_K = 2


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return measure()


def balance(probs_TE: torch.Tensor) -> float:
    """``E sum_e f_e P_e``: f the share of all choices that fell on e, P the mean probability of e."""
    num_tokens, num_experts = probs_TE.shape
    chosen = torch.bincount(probs_TE.topk(TOP_K).indices.flatten(), minlength=num_experts)
    return float(num_experts * (chosen / (TOP_K * num_tokens) * probs_TE.mean(0)).sum())


def test_load_is_balanced_in_every_layer_not_over_the_layers_together(measured: dict[str, Any]) -> None:
    """Ours is the definition layer by layer; transformers pools the layers and multiplies by top-k."""
    ours, theirs = measured["balance"]["ours"], measured["balance"]["theirs"]
    layers = [torch.tensor(logits).softmax(-1) for logits in measured["balance"]["router_logits"]]
    assert ours == pytest.approx([balance(layer) for layer in layers], rel=1e-5)
    pooled = balance(torch.cat(layers))
    assert theirs == pytest.approx(TOP_K * pooled, rel=1e-5)
    assert pooled < 0.9 * min(ours), "each layer is uneven, and pooling hides it"


def test_gated_norm_rounds_once(measured: dict[str, Any]) -> None:
    """transformers rounds the normalised value to bf16 before weight and gate."""
    ours, theirs = measured["gated_norm"]
    assert ours <= 2**-8
    assert theirs > 1.5 * ours


def test_rotary_angles_stay_fp32(measured: dict[str, Any]) -> None:
    """transformers rounds sine and cosine to bf16, and each product."""
    ours, theirs = measured["rotary"]
    assert ours < 2**-9
    assert theirs > 1.5 * ours


def test_router_decides_in_fp32(measured: dict[str, Any]) -> None:
    """In bf16 some tokens go to other experts."""
    ours, theirs = measured["router"]
    assert ours <= 0.001
    assert theirs > 0.01


def test_delta_rule_stops_at_a_documents_end(measured: dict[str, Any]) -> None:
    """transformers isolates attention by position ids, and its torch path carries the linear state over."""
    for ours, _ in measured["packed"].values():
        assert ours < 1e-5
    assert measured["packed"]["full_attention"][1] < 1e-5
    assert measured["packed"]["linear_attention"][1] > 1e-2


def test_a_row_without_a_target_has_loss_zero(measured: dict[str, Any]) -> None:
    ours, theirs = measured["single_token"]
    assert ours == 0
    assert math.isnan(theirs)


def test_transformers_casts_what_we_keep_in_fp32_and_drops_mtp(measured: dict[str, Any]) -> None:
    assert set(measured["bf16"].values()) == {"torch.bfloat16"}
    kept = {spec.name for spec in parameter_table(small_config()) if spec.fp32}
    assert {f"model.layers.0.{name}" for name in measured["bf16"]} <= kept
    assert measured["dropped"] == ["^mtp.*"]
