"""Activations by part, with and without recompute: by hand on the tiny shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3next_train.accounting.activations import (
    activation_bytes,
    expert_room,
    expert_rows,
    kept_tensors,
    ranks_per_token,
    saved_tensors,
)
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import RecomputePart, TokenExchange
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, TINY

ONE = Layout(1, 1, 1, "fp32", 1, 16)
BF16 = replace(ONE, precision="bf16")


def _with(*recompute: RecomputePart, layout: Layout = BF16) -> dict[str, int]:
    return activation_bytes(TINY, replace(layout, recompute=frozenset(recompute)))


def test_activations_scale_with_tokens() -> None:
    """Twice the rows, twice what depends on tokens; the joined weights of the shared experts do not."""
    one = activation_bytes(TINY, ONE)
    two = activation_bytes(TINY, replace(ONE, micro_batch_size=2))
    fixed = 3 * 4 * 2 * 7 * 8
    assert two["activations_moe"] - fixed == 2 * (one["activations_moe"] - fixed)
    for kind in ("gdn", "attention", "other"):
        assert two[f"activations_{kind}"] == 2 * one[f"activations_{kind}"]


@pytest.mark.parametrize("recompute", [(), ("norms", "activations"), ("layer",)])
def test_two_micro_batches_in_flight_are_kept_as_one_of_twice_the_rows(recompute: tuple[RecomputePart, ...]) -> None:
    """But for what exists of one at a time: a chunk of logits, and what is recomputed but whole layers."""
    layout = replace(ONE, world_size=2, expert_parallel_size=2, recompute=frozenset(recompute))
    two = activation_bytes(TINY, replace(layout, micro_batches_in_flight=2))
    wide = activation_bytes(TINY, replace(layout, micro_batch_size=2))
    one = activation_bytes(TINY, layout)
    for part in ("activations_gdn", "activations_attention", "activations_moe", "activations_other", "all_to_all"):
        assert two[part] == wide[part]
    assert two["imbalance"] == wide["imbalance"]
    assert two["rebuilt_layer"] == (wide if recompute == ("layer",) else one)["rebuilt_layer"]
    depths, vocabulary, hidden, tokens, size = 1 + TINY.mtp_num_layers, TINY.vocab_size, TINY.hidden_size, 16, 4
    assert two["logits"] - one["logits"] == depths * size * hidden * (vocabulary + tokens)


def test_tokens_of_a_rank_are_those_of_its_slices() -> None:
    """Four ranks that share rows keep of their layers what one with rows a quarter as long keeps, and states."""
    short_rows = replace(BF16, world_size=4, sequence_length=2048)
    long_rows = replace(short_rows, sequence_length=8192, context_parallel_size=4)
    for recompute in ((), ("layer",)):
        short, shared = (
            activation_bytes(QWEN3_NEXT_80B, replace(layout, recompute=frozenset(recompute)))
            for layout in (short_rows, long_rows)
        )
        for part in ("activations_moe", "activations_other", "logits"):
            assert shared[part] == short[part], part
        assert short["all_to_all"] == 0 < shared["all_to_all"]
        # An arriving state and a transition of 2 MiB each, and the decays, unless the whole layer is done again.
        states = 0 if recompute else 36 * (4 * 2**20 + 2048 * 32 * 4)
        assert shared["activations_gdn"] == short["activations_gdn"] + states


def test_dispatch_exists_only_with_expert_parallelism() -> None:
    """16 tokens, each to 2 x (1 - 1/6) ranks, there and back; nothing of it is kept; a fifth for imbalance."""
    alone = activation_bytes(TINY, ONE)
    apart = activation_bytes(TINY, replace(ONE, world_size=2, expert_parallel_size=2, token_exchange="exact"))
    assert alone["all_to_all"] == alone["imbalance"] == 0
    row = 8 * 4
    assert ranks_per_token(TINY, 2) == pytest.approx(5 / 3)
    assert apart["all_to_all"] == 2 * round(16 * row * 5 / 3)
    assert apart["activations_moe"] == alone["activations_moe"]
    routed = 3 * 16 * 2 * 4 * (8 + 3 * 6)
    assert apart["imbalance"] == (routed + apart["all_to_all"]) // 5


def test_the_dense_exchange_has_room_for_rows() -> None:
    """16 tokens to both ranks and back; where rows are found; all that two experts of four can get, twice the mean."""
    alone = activation_bytes(TINY, ONE)
    dense = replace(ONE, world_size=2, expert_parallel_size=2, token_exchange="dense")
    apart = activation_bytes(TINY, dense)
    assert apart["all_to_all"] == 2 * 2 * 16 * 8 * 4
    assert apart["activations_moe"] == alone["activations_moe"] + 3 * 16 * 8 * 2
    assert apart["imbalance"] == 3 * 16 * 2 * 4 * (8 + 3 * 6)
    # With recompute all tokens that arrived are kept, however uneven the load.
    layout = replace(dense, recompute=frozenset(("activations",)))
    assert activation_bytes(TINY, layout)["imbalance"] == 3 * 16 * 2 * 4 * 2 * 6


def test_room_for_rows_is_a_quarter_more_than_expected_and_no_more_than_there_can_be() -> None:
    layout = Layout(4, 4, 1, "bf16", 4, 4096)
    mean = expert_rows(QWEN3_NEXT_80B, layout)
    assert mean == 163_840
    assert expert_room(QWEN3_NEXT_80B, layout, mean) == 204_800 + 1_024
    assert expert_room(QWEN3_NEXT_80B, layout, 4 * mean) == 4 * mean


@pytest.mark.parametrize(
    ("size", "choice", "ranks_per_node", "dense"),
    [
        (1, "dense", 8, False),
        (2, "auto", 8, True),
        (4, "auto", 8, True),
        (4, "auto", 2, False),
        (4, "dense", 2, True),
        (8, "auto", 8, False),
        (8, "dense", 8, True),
        (4, "exact", 8, False),
    ],
)
def test_which_tokens_travel(size: int, choice: TokenExchange, ranks_per_node: int, dense: bool) -> None:
    layout = Layout(8, size, 1, "bf16", 1, 16, token_exchange=choice, ranks_per_node=ranks_per_node)
    assert layout.exchanges_densely is dense


def test_a_token_goes_to_fewer_ranks_than_experts() -> None:
    """10 of 512 experts over 8 ranks are 5.92 ranks; over 512 ranks they are 10."""
    assert ranks_per_token(QWEN3_NEXT_80B, 8) == pytest.approx(5.92, abs=0.005)
    assert ranks_per_token(QWEN3_NEXT_80B, 512) == pytest.approx(10)


def test_long_rows_do_not_grow_the_logits_chunk() -> None:
    """Beyond a chunk only the waiting gradients of the inputs of both uses grow."""
    short = activation_bytes(QWEN3_NEXT_80B, Layout(64, 8, 1, "bf16", 1, 16384))["logits"]
    long = activation_bytes(QWEN3_NEXT_80B, Layout(64, 8, 1, "bf16", 1, 32768))["logits"]
    # 2 chunks of 8,192 tokens in bf16, twice the weight's gradient in fp32 and the input's in bf16.
    assert short == 8192 * 151936 * 2 + 2 * (151936 * 2048 * 4 + 16384 * 2048 * 2)
    assert long - short == 2 * 16384 * 2048 * 2


def test_sources_exist_and_are_kept() -> None:
    """What is recomputed has sources of its own kind of layer; recomputing everything keeps only what has no part."""
    for tensors in saved_tensors(QWEN3_NEXT_80B, "bf16").values():
        names = [tensor.name for tensor in tensors]
        assert len(set(names)) == len(names)
        assert all(set(tensor.sources) <= set(names) for tensor in tensors)
        assert kept_tensors(tensors, ()) == tensors
        everything = kept_tensors(tensors, ("norms", "activations", "gdn_prologue"))
        assert everything == tuple(tensor for tensor in tensors if tensor.part is None)


def test_copies_for_experts_are_made_again_from_what_other_ranks_sent() -> None:
    """What arrives is kept in place of ten copies; with one rank, the norm's output or what that is made from."""
    for expert_parallel_size, source in ((1, "post_attention_layernorm input"), (8, "rows from other ranks")):
        tensors = saved_tensors(QWEN3_NEXT_80B, "bf16", expert_parallel_size=expert_parallel_size)["moe"]
        kept = {tensor.name for tensor in kept_tensors(tensors, ("norms", "activations"))}
        assert source in kept
        assert "expert rows in" not in kept
        assert "rows from other ranks" not in {tensor.name for tensor in kept_tensors(tensors, ("norms",))}


def test_whole_layers_keep_their_input() -> None:
    """16 tokens x 8 values x 2 bytes a layer; the largest layer exists once more; what is in no layer stays."""
    none, full = _with(), _with("layer")
    assert full["activations_gdn"] == 16 * 8 * 2
    assert full["activations_attention"] == 2 * 16 * 8 * 2, "one decoder layer and the MTP layer"
    assert full["activations_moe"] == 0
    assert full["activations_other"] == none["activations_other"]
    largest = max(none["activations_gdn"], none["activations_attention"] // 2)
    assert full["rebuilt_layer"] == largest + none["activations_moe"] // 3
    assert full["logits"] == none["logits"]


def test_parts_besides_whole_layers_count_outside_of_layers() -> None:
    """The final norm's output and those of MTP's three norms."""
    whole, both = _with("layer"), _with("layer", "norms")
    assert whole["activations_other"] - both["activations_other"] == 4 * 16 * 8 * 2
    assert {key: value for key, value in whole.items() if key != "activations_other"} == {
        key: value for key, value in both.items() if key != "activations_other"
    }


def test_each_part_saves_what_it_rebuilds() -> None:
    """TINY in bf16 by hand: width 8, 6 key and 10 value channels, 2 heads, 4 query columns, 4 key columns."""
    none = _with()
    norms, activations, gates = _with("norms"), _with("activations"), _with("gdn_prologue")
    for kind, saved in (
        ("gdn", 16 * 2 * 8),
        ("attention", 2 * 16 * 2 * (8 + 8 + 4)),
        ("moe", 3 * 16 * 2 * 8),
        ("other", 4 * 16 * 2 * 8),
    ):
        assert none[f"activations_{kind}"] - norms[f"activations_{kind}"] == saved, kind
    for kind, saved in (("gdn", 16 * 2 * 10), ("attention", 2 * 16 * 2 * 8), ("moe", 3 * 16 * 2 * (2 * 6 + 7 + 2 * 8))):
        assert none[f"activations_{kind}"] - activations[f"activations_{kind}"] == saved, kind
    assert none["activations_gdn"] - gates["activations_gdn"] == 16 * 2 * (16 + 2)


def test_rebuilt_tensors_of_one_layer_exist_again() -> None:
    """Of the kind of layer that recomputes most."""
    none, cheap = _with(), _with("norms", "activations", "gdn_prologue")
    gdn = none["activations_gdn"] - cheap["activations_gdn"]
    attention = (none["activations_attention"] - cheap["activations_attention"]) // 2
    moe = (none["activations_moe"] - cheap["activations_moe"]) // 3
    assert cheap["rebuilt_layer"] == max(gdn, attention, moe)
    assert none["rebuilt_layer"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_recomputing_never_keeps_more(precision: Precision) -> None:
    """More parts, fewer bytes."""
    layout = Layout(64, 8, 1, precision, 1, 4096)
    ladder: tuple[tuple[RecomputePart, ...], ...] = (
        *((), ("norms",), ("norms", "activations"), ("norms", "activations", "gdn_prologue"), ("layer",)),
        ("layer", "norms"),
    )
    totals = [
        sum(activation_bytes(QWEN3_NEXT_80B, replace(layout, recompute=frozenset(parts))).values()) for parts in ladder
    ]
    assert totals == sorted(totals, reverse=True)


def test_imbalance_counts_the_rows_that_exist() -> None:
    """Of whole layers those of one layer, else those that every layer keeps."""
    apart = replace(BF16, world_size=2, expert_parallel_size=2, token_exchange="exact")
    exchange = 2 * round(16 * 8 * 2 * 5 / 3)
    rows, inner = 16 * 2 * 2 * 8, 16 * 2 * 2 * 6
    for recompute, routed in (
        ((), 3 * (rows + 3 * inner)),
        (("activations",), 3 * (16 * round(8 * 2 * 5 / 3) + 2 * inner)),
        (("layer",), rows + 3 * inner),
    ):
        assert _with(*recompute, layout=apart)["imbalance"] == (routed + exchange) // 5
