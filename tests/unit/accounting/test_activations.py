"""Activations by part, with and without recomputation: by hand on the tiny shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3next_train.accounting.activations import Recompute, activation_bytes, saved_tensors
from qwen3next_train.accounting.layout import Layout
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, TINY

ONE = Layout(1, 1, 1, "fp32", 1, 16)
BF16 = replace(ONE, precision="bf16")


def test_activations_scale_with_tokens() -> None:
    """Twice the rows, twice what depends on tokens; the regrouped GDN weights do not."""
    one = activation_bytes(TINY, ONE)
    two = activation_bytes(TINY, replace(ONE, micro_batch_size=2))
    fixed = 4 * (2 * 3 + 2 * 10 + 2 * 2) * 8
    assert two["activations_gdn"] - fixed == 2 * (one["activations_gdn"] - fixed)
    for kind in ("attention", "moe", "other"):
        assert two[f"activations_{kind}"] == 2 * one[f"activations_{kind}"]


def test_dispatch_exists_only_with_expert_parallelism() -> None:
    """Send and receive of 16 tokens x 2 experts x 8 fp32 values, and a fifth for imbalance."""
    alone = activation_bytes(TINY, ONE)
    apart = activation_bytes(TINY, replace(ONE, world_size=2, expert_parallel_size=2))
    assert alone["all_to_all"] == alone["imbalance"] == 0
    assert apart["all_to_all"] == 2 * 16 * 2 * 8 * 4
    routed = 3 * 16 * 2 * 4 * (2 * 8 + 4 * 6)
    assert apart["imbalance"] == (routed + apart["all_to_all"]) // 5


def test_long_rows_do_not_grow_the_logits_chunk() -> None:
    """Beyond a chunk only the waiting MTP gradients grow."""
    short = activation_bytes(QWEN3_NEXT_80B, Layout(64, 8, 1, "bf16", 1, 16384))["logits"]
    long = activation_bytes(QWEN3_NEXT_80B, Layout(64, 8, 1, "bf16", 1, 32768))["logits"]
    assert long - short == 16384 * 2048 * 2


def test_names_of_saved_tensors_are_unique() -> None:
    """A recompute policy selects by name."""
    for tensors in saved_tensors(QWEN3_NEXT_80B.model_copy(update={"mtp_num_layers": 0}), "bf16").values():
        names = [tensor.name for tensor in tensors]
        assert len(set(names)) == len(names)


def test_whole_layers_keep_their_input() -> None:
    """16 tokens x 8 values x 2 bytes a layer; the largest layer exists once more; what is in no layer stays."""
    none, full = activation_bytes(TINY, BF16), activation_bytes(TINY, BF16, "full")
    assert full["activations_gdn"] == 16 * 8 * 2
    assert full["activations_attention"] == 2 * 16 * 8 * 2, "one decoder layer and the MTP layer"
    assert full["activations_moe"] == 0
    assert full["activations_other"] == none["activations_other"]
    largest = max(none["activations_gdn"], none["activations_attention"] // 2)
    assert full["rebuilt_layer"] == largest + none["activations_moe"] // 3
    assert full["logits"] == none["logits"]


def test_selective_keeps_what_it_rebuilds_from() -> None:
    """A Gated DeltaNet layer in bf16: width 8, 6 key and 10 value channels, 2 heads."""
    selective = activation_bytes(TINY, BF16, "selective")
    norm_input, conv_input, gates = 2 * 8, 2 * 16, 2 * 2 * 2
    chunk_matrix, rule_output_and_gate = 2 * 2 * 64, 2 * 2 * 10
    weights = 2 * (2 * 3 + 2 * 10 + 2 * 2) * 8
    kept = norm_input + conv_input + gates + chunk_matrix + rule_output_and_gate
    assert selective["activations_gdn"] == 16 * kept + weights
    # Experts, three blocks: norm input, four probabilities in fp32, two choices; two rows in and out, their gate and
    # up; shared gate and up, its output.
    experts = 2 * 8 + 4 * 4 + 2 * 32 + 2 * 2 * 2 * 8 + 2 * 2 * 2 * 6 + 2 * 2 * 7 + 2 * 8
    assert selective["activations_moe"] == 3 * 16 * experts


def test_rebuilt_tensors_of_one_layer_exist_again() -> None:
    """Of the kind of layer that rebuilds most."""
    none, selective = activation_bytes(TINY, BF16), activation_bytes(TINY, BF16, "selective")
    gdn = none["activations_gdn"] - selective["activations_gdn"]
    attention = (none["activations_attention"] - selective["activations_attention"]) // 2
    moe = (none["activations_moe"] - selective["activations_moe"]) // 3
    assert selective["rebuilt_layer"] == max(gdn, attention, moe)
    assert "rebuilt_layer" not in none


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rebuilding_never_keeps_more(precision: str) -> None:
    """What something is rebuilt from is no larger than itself and all that shares its source."""
    layout = replace(Layout(64, 8, 1, "bf16", 1, 4096), precision=precision)  # type: ignore[arg-type]
    totals = {}
    modes: tuple[Recompute, ...] = ("full", "selective", "none")
    for mode in modes:
        totals[mode] = sum(activation_bytes(QWEN3_NEXT_80B, layout, mode).values())
    assert list(totals.values()) == sorted(totals.values())


def test_imbalance_counts_the_rows_that_exist() -> None:
    """Under full recomputation those of one layer, else those that every layer keeps."""
    apart = replace(BF16, world_size=2, expert_parallel_size=2)
    exchange = 2 * 16 * 2 * 8 * 2
    rows, inner = 16 * 2 * 2 * 2 * 8, 16 * 2 * 2 * 2 * 6
    expected = {"none": 3 * (rows + 2 * inner), "selective": 3 * (rows + inner), "full": rows + 2 * inner}
    for mode, routed in expected.items():
        assert activation_bytes(TINY, apart, mode)["imbalance"] == (routed + exchange) // 5  # type: ignore[arg-type]
