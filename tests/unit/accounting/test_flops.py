"""Exact FLOPs: by hand, and against the published figures of the 80B; test_built_flops.py counts the real model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from qwen3next_train.accounting.flops import forward_flops, training_flops
from qwen3next_train.accounting.megatron_flops import megatron_training_flops
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, TINY

SEQUENCE, ROWS = 4096, 256
TOKENS, SQUARES = ROWS * SEQUENCE, ROWS * SEQUENCE**2


def test_tiny_by_hand() -> None:
    """Ten tokens in documents of 7 and 3: multiply-adds per token x 2 x 10, scores 2 x 58 x query width 8."""
    assert forward_flops(TINY, num_tokens=10, sum_squared_lengths=58) == {
        "gdn_projections": 20 * 8 * (3 + 3 + 10 + 10 + 4 + 10),
        "gdn_conv": 20 * 2 * 16,
        "gdn_delta_rule": 20 * 4 * 2 * 3 * 5,
        "attention_projections": 20 * 8 * (16 + 4 + 4 + 8),
        "router": 2 * 20 * 32,
        "routed_experts": 2 * 20 * 2 * 3 * 8 * 6,
        "shared_expert": 2 * 20 * 3 * 8 * 7,
        "shared_expert_gate": 2 * 20 * 8,
        "head": 20 * 88,
        "mtp_fc": 20 * 16 * 8,
        "mtp_attention_projections": 20 * 8 * 32,
        "mtp_router": 20 * 32,
        "mtp_routed_experts": 20 * 2 * 3 * 8 * 6,
        "mtp_shared_expert": 20 * 3 * 8 * 7,
        "mtp_shared_expert_gate": 20 * 8,
        "mtp_head": 20 * 88,
        "attention_scores": 928,
        "mtp_attention_scores": 928,
    }


def test_training_is_three_times_forward() -> None:
    """An exact integer, also far beyond float's."""
    forward = forward_flops(QWEN3_NEXT_80B, num_tokens=TOKENS, sum_squared_lengths=SQUARES)
    total = training_flops(QWEN3_NEXT_80B, num_tokens=TOKENS, sum_squared_lengths=SQUARES)
    assert isinstance(total, int)
    assert total == 3 * sum(forward.values())
    huge = training_flops(QWEN3_NEXT_80B, num_tokens=10**18 + 1, sum_squared_lengths=0)
    assert huge == (10**18 + 1) * training_flops(QWEN3_NEXT_80B, num_tokens=1, sum_squared_lengths=0)


def test_80b_golden() -> None:
    """2.667341e16 (25.437745 GFLOP a token) is every product of 36 + 13 layers; no norms."""
    total = training_flops(QWEN3_NEXT_80B, num_tokens=TOKENS, sum_squared_lengths=SQUARES)
    assert total == 26_673_409_060_503_552
    assert total / TOKENS == pytest.approx(25.437745e9, abs=500)


def test_80b_reconciles_with_megatron_term_by_term() -> None:
    """Megatron-Bridge's figure (36 + 13 layers) plus router and shared gate, less the MTP norms, is ours."""
    bridge = megatron_training_flops(QWEN3_NEXT_80B, num_tokens=TOKENS, sum_squared_lengths=SQUARES, list_pattern=True)
    router_and_gate = 6 * TOKENS * 49 * 2048 * (512 + 1)
    mtp_norms = 6 * TOKENS * 3 * 2048
    ours = training_flops(QWEN3_NEXT_80B, num_tokens=TOKENS, sum_squared_lengths=SQUARES)
    assert ours == int(bridge) + router_and_gate - mtp_norms


def test_packing_changes_only_the_scores() -> None:
    """Documents of half the length halve the scores and nothing else."""
    whole = forward_flops(TINY, num_tokens=64, sum_squared_lengths=64**2)
    halves = forward_flops(TINY, num_tokens=64, sum_squared_lengths=2 * 32**2)
    changed = {part for part in whole if whole[part] != halves[part]}
    assert changed == {"attention_scores", "mtp_attention_scores"}
    assert all(whole[part] == 2 * halves[part] for part in changed)


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_mtp_parts_scale_with_depth(depths: int) -> None:
    """No depth, no MTP FLOPs; three depths, three heads."""
    model = TINY.model_copy(update={"mtp_num_layers": depths})
    flops = forward_flops(model, num_tokens=10, sum_squared_lengths=100)
    one = forward_flops(TINY, num_tokens=10, sum_squared_lengths=100)
    assert all(flops[part] == depths * one[part] for part in one if part.startswith("mtp_"))
    assert all(flops[part] == one[part] for part in one if not part.startswith("mtp_"))


def test_absent_parts_are_zero() -> None:
    """Without gate, shared expert and GDN layers those parts count nothing."""
    model = TINY.model_copy(
        update={
            "layer_types": ["full_attention", "full_attention"],
            "attention_output_gate": False,
            "shared_expert_intermediate_size": 0,
        }
    )
    flops = forward_flops(model, num_tokens=1, sum_squared_lengths=1)
    assert flops["gdn_projections"] == flops["gdn_conv"] == flops["gdn_delta_rule"] == 0
    assert flops["shared_expert"] == flops["shared_expert_gate"] == 0
    assert flops["attention_projections"] == 2 * 2 * 8 * (8 + 4 + 4 + 8)


def test_unresolved_pattern_is_refused() -> None:
    """An empty ``layer_types`` must not pass as a model without layers."""
    with pytest.raises(AssertionError, match="layer_types"):
        forward_flops(TINY.model_copy(update={"layer_types": []}), num_tokens=1, sum_squared_lengths=1)


def test_scores_are_half_of_torch_counter() -> None:
    """torch counts the full square of an attention call, we the causal half."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        q, k, v = (torch.empty(1, heads, 10, 4) for heads in (2, 2, 2))
        F.scaled_dot_product_attention(q, k, v)
    ours = forward_flops(TINY, num_tokens=10, sum_squared_lengths=100)["attention_scores"]
    assert counter.get_total_flops() == 2 * ours


def test_conv_and_delta_rule_against_torch_counter() -> None:
    """Depthwise convolution, and the four products of the recurrence for every token and value head."""
    tokens, heads, key, value = 10, 2, 3, 5
    ours = forward_flops(TINY, num_tokens=tokens, sum_squared_lengths=100)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        padded = torch.empty(1, 16, tokens + 1)
        F.conv1d(padded, torch.empty(16, 1, 2), groups=16)
    assert ours["gdn_conv"] == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        state = torch.empty(tokens * heads, key, value)
        row, column = torch.empty(tokens * heads, 1, key), torch.empty(tokens * heads, key, 1)
        erased = torch.bmm(row, state)
        torch.bmm(column, erased)
        torch.bmm(column, torch.empty(tokens * heads, 1, value))
        torch.bmm(row, state)
    assert ours["gdn_delta_rule"] == counter.get_total_flops()
