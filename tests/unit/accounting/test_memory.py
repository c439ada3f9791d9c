"""Memory by part: by hand on the tiny shape, against a table computed elsewhere for the 80B."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest

from qwen3next_train.accounting.activations import activation_bytes
from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import (
    REDUCE_BUCKET_NUMEL,
    RUNTIME_BYTES,
    host_bytes_per_gpu,
    memory_per_gpu,
    persistent_numel,
    snapshot_bytes_per_gpu,
    stage3_limits,
)
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.errors import ConfigError
from qwen3next_train.parameters import parameter_table
from tests.unit.accounting.shapes import QWEN3_NEXT_80B, QWEN3_NEXT_80B_WITHOUT_MTP, TINY

Stage = Literal[1, 2, 3]
ONE = Layout(1, 1, 1, "fp32", 1, 16)

# TINY by hand. Experts: 3 blocks x 4 experts x 3 x 8 x 6. fp32 even in bf16 runs: routers 3 x 4 x 8, A_log and
# dt_bias 2 each. Norms without decay: 2 layers x 16, final 8, GDN 5, MTP 3 x 8 + 16.
EXPERTS = 3 * 4 * 3 * 8 * 6
ROUTERS, GATES = 3 * 4 * 8, 4
NORMS = 2 * 16 + 8 + 5 + 3 * 8 + 16
QK_NORMS = 2 * 2 * 4
EMBEDDINGS = 2 * 11 * 8
GDN = 16 * 2 + 26 * 8 + 4 * 8 + 8 * 10
ATTENTION = 2 * (16 * 8 + 2 * 4 * 8 + 8 * 8)
SHARED = 3 * (3 * 7 * 8 + 8)
DECAYED = EMBEDDINGS + GDN + ATTENTION + SHARED + QK_NORMS + 16 * 8
DENSE = DECAYED + ROUTERS + GATES + NORMS


def _up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def test_hand_count_is_the_whole_model() -> None:
    """The constants above add up to the parameter table."""
    assert sum(spec.numel for spec in parameter_table(TINY)) == DENSE + EXPERTS


def test_one_process_fp32() -> None:
    """4 bytes weights, 4 gradients, 12 optimizer, groups padded to 2 elements."""
    memory = memory_per_gpu(TINY, ONE)
    padded = _up(DECAYED + ROUTERS, 2) + _up(NORMS + GATES, 2) + EXPERTS
    assert memory["weights"] == 4 * padded
    assert memory["gradients"] == 4 * padded
    assert memory["optimizer"] == 12 * padded
    largest = 4 * 12 * 8
    assert memory["zero_buffers"] == 4 * largest


def test_bf16_keeps_flagged_parameters_in_fp32() -> None:
    """Router, A_log and dt_bias take 4 bytes; gradients are fp32 all the same."""
    memory = memory_per_gpu(TINY, replace(ONE, precision="bf16"))
    assert memory["weights"] == 2 * (DECAYED + _up(NORMS, 2) + EXPERTS) + 4 * (ROUTERS + GATES)
    assert memory["gradients"] == 4 * (DECAYED + _up(NORMS, 2) + EXPERTS + ROUTERS + GATES)


def test_bf16_gradients_take_two_bytes_but_for_weights_in_fp32() -> None:
    fp32, bf16 = (memory_per_gpu(TINY, replace(ONE, precision="bf16", gradient_dtype=d)) for d in ("fp32", "bf16"))
    assert bf16["gradients"] == 2 * (DECAYED + _up(NORMS, 2) + EXPERTS) + 4 * (ROUTERS + GATES)
    assert {part for part in fp32 if fp32[part] != bf16[part]} == {"gradients"}


def test_bf16_moments_take_eight_bytes_with_the_master() -> None:
    """4 + 2 + 2 a parameter instead of 4 + 4 + 4; nothing else changes, the step's fp32 gradient included."""
    layout = Layout(64, 8, 1, "bf16", 1, 1)
    wide, narrow = (memory_per_gpu(QWEN3_NEXT_80B, replace(layout, moments_dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert narrow["optimizer"] * 12 == wide["optimizer"] * 8
    assert {part for part in wide if wide[part] != narrow[part]} == {"optimizer"}


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (2, "fp32")])
def test_an_offloaded_optimizer_is_in_host_memory(stage: Stage, precision: Precision) -> None:
    """Master, gradient and moments of a partition, its weights and the largest gradient; fp32 sums under stage 2."""
    layout = replace(ONE, world_size=8, zero_stage=stage, precision=precision)
    here, there = memory_per_gpu(TINY, layout), memory_per_gpu(TINY, replace(layout, offload_optimizer=True))
    assert there["optimizer"] == 0
    assert there["weights"] == here["weights"]
    largest = 4 * 12 * 8 * layout.element_bytes
    # Gradients are summed in the buffers they are reduced from, but not for an optimizer on the host. Those of stage 2,
    # which are there for a part of a backward pass, are all of these few parameters.
    lent, bucket = (0, 4) if stage == 1 else (8 * here["gradients"], 8)
    assert here["zero_buffers"] == largest + lent
    assert there["zero_buffers"] == 2 * largest + bucket * REDUCE_BUCKET_NUMEL
    whole = 4 * (DENSE + EXPERTS)
    assert there["gradients"] == (0 if precision == "fp32" else whole if stage == 1 else here["gradients"])
    partitions = here["optimizer"] // 12
    host = host_bytes_per_gpu(TINY, replace(layout, offload_optimizer=True))
    assert host == 16 * partitions + here["weights"] // 8 + largest
    assert host_bytes_per_gpu(TINY, layout) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_copy_of_the_state_is_as_large_as_the_optimizer_wherever_that_is(stage: Stage) -> None:
    layout = replace(ONE, world_size=8, zero_stage=stage, expert_parallel_size=2)
    for moments_dtype, state_bytes in (("fp32", 12), ("bf16", 8)):
        kept = replace(layout, moments_dtype=moments_dtype)
        copy = snapshot_bytes_per_gpu(TINY, kept)
        assert copy == memory_per_gpu(TINY, kept)["optimizer"]
        assert copy == snapshot_bytes_per_gpu(TINY, replace(kept, offload_optimizer=True))
        assert copy * 12 == snapshot_bytes_per_gpu(TINY, layout) * state_bytes


@pytest.mark.parametrize(("stage", "gradient_ranks"), [(1, (1, 1)), (2, (8, 4))])
def test_expert_and_data_parallel_sharding(stage: Stage, gradient_ranks: tuple[int, int]) -> None:
    """8 ranks, EP 2: dense over 8, a rank's two experts over the 4 ranks that hold them."""
    memory = memory_per_gpu(TINY, replace(ONE, world_size=8, expert_parallel_size=2, zero_stage=stage))
    dense = _up(DECAYED + ROUTERS, 16) + _up(NORMS + GATES, 16)
    experts = _up(EXPERTS // 2, 8)
    assert memory["weights"] == 4 * (dense + experts)
    assert memory["optimizer"] == 12 * (dense // 8 + experts // 4)
    dense_ranks, expert_ranks = gradient_ranks
    assert memory["gradients"] == 4 * (dense // dense_ranks + experts // expert_ranks)


@pytest.mark.parametrize(("world", "expert_parallel"), [(1, 1), (2, 2), (4, 2)])
def test_gradients_that_nobody_shares_are_no_layer_s_under_stage_3(world: int, expert_parallel: int) -> None:
    """Of them there is one placeholder at a time, of the experts' larger matrix or of what is largest of all."""
    layout = replace(ONE, world_size=world, expert_parallel_size=expert_parallel, zero_stage=3)
    experts = EXPERTS // 3 // expert_parallel
    dense = GDN + GATES + 5 + 4 * 8 + SHARED // 3 + 2 * 8
    largest_experts = experts * 2 // 3
    assert largest_experts > 11 * 8
    # All shared weights are gathered at once, and their gradients in the bucket and sent.
    expected = {
        (1, 1): largest_experts,
        (2, 2): dense + largest_experts + 3 * DENSE,
        (4, 2): dense + experts + 3 * (DENSE + 3 * experts),
    }
    assert memory_per_gpu(TINY, layout)["zero_buffers"] == 4 * expected[world, expert_parallel]


def test_buckets_of_stage_2_are_whole_for_a_part_of_a_pass() -> None:
    """The 80B, EP 8 on 64: the embedding's from MTP on, the head's under way, of each kind two or a layer's experts."""
    layout = Layout(64, 8, 2, "bf16", 1, 1)
    embedding, head = (spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if spec.shape == (151_936, 2048))
    (gate_up, *_), (down, *_) = (
        [spec.numel // 8 for spec in parameter_table(QWEN3_NEXT_80B) if spec.name.endswith(name)]
        for name in ("experts.gate_up_proj", "experts.down_proj")
    )
    whole = memory_per_gpu(QWEN3_NEXT_80B, replace(layout, zero_stage=1))
    lent = memory_per_gpu(QWEN3_NEXT_80B, layout)["zero_buffers"] - whole["zero_buffers"]
    small = sum(spec.numel for spec in parameter_table(QWEN3_NEXT_80B) if spec.fp32 or not (spec.decay or spec.qk_norm))
    assert lent == pytest.approx(4 * (embedding + head + gate_up + down + 200_000_000 + small), rel=1e-6)
    alone = memory_per_gpu(QWEN3_NEXT_80B, replace(layout, expert_parallel_size=64))["zero_buffers"]
    assert alone - whole["zero_buffers"] == pytest.approx(lent - 4 * (gate_up + down), rel=1e-6)


def test_stage3_partitions_every_parameter() -> None:
    """Each tensor is padded by itself; small ones stay gathered besides."""
    memory = memory_per_gpu(TINY, replace(ONE, world_size=8, expert_parallel_size=2, zero_stage=3))
    pieces = whole = 0
    for spec in parameter_table(TINY):
        local, ranks = (spec.numel // 2, 4) if spec.expert else (spec.numel, 8)
        pieces += -(-local // ranks)
        whole += -(-local // ranks) * ranks if local <= persistent_numel(TINY) else 0
    assert 0 < whole < sum(spec.numel for spec in parameter_table(TINY))
    assert memory["weights"] == 4 * (pieces + whole)
    assert memory["gradients"] == 4 * pieces
    assert memory["optimizer"] == 12 * pieces
    # The largest layer's gradients at once, and all weights gathered, all gradients in the bucket and sent: they are
    # fewer than stage 3 keeps, or the bucket holds.
    layer = GDN + GATES + 5 + 4 * 8 + EXPERTS // 6 + SHARED // 3 + 2 * 8
    assert memory["zero_buffers"] == 4 * (layer + 3 * (DENSE + EXPERTS // 2))


@pytest.mark.parametrize(("expert_parallel", "tensor_parallel"), [(1, 1), (8, 1), (8, 2)])
def test_stage3_has_room_for_two_layers_beside_what_is_in_none(expert_parallel: int, tensor_parallel: int) -> None:
    """Counted over the whole table of the 80B, of which experts and heads are divided."""
    layers: Counter[str] = Counter()
    for spec in parameter_table(QWEN3_NEXT_80B):
        shares = expert_parallel if spec.expert else tensor_parallel if spec.heads else 1
        in_layer = re.match(r"(model|mtp)\.layers\.\d+", spec.name)
        layers[in_layer.group() if in_layer else ""] += spec.numel // shares
    others = layers.pop("")
    found = stage3_limits(QWEN3_NEXT_80B, expert_parallel_size=expert_parallel, tensor_parallel_size=tensor_parallel)
    assert found.layer == max(layers.values())
    # MTP's norms outside of its layer are too small to be partitioned.
    others -= 3 * QWEN3_NEXT_80B.hidden_size
    assert found.live == max(1_000_000_000, others + 2 * found.layer)
    assert found.reuse == found.live - others - found.layer
    layout = Layout(64, expert_parallel, 3, "bf16", 1, 16, tensor_parallel_size=tensor_parallel)
    # Embedding and head, or the experts' larger matrix.
    largest = max(QWEN3_NEXT_80B.vocab_size, 2 * 512 * 512 // expert_parallel) * QWEN3_NEXT_80B.hidden_size
    buffers = memory_per_gpu(QWEN3_NEXT_80B, layout)["zero_buffers"]
    # Gradients of a layer or of the head at once, and either may be gathered beyond the limit.
    assert buffers == 2 * (REDUCE_BUCKET_NUMEL + 2 * max(found.layer, largest) + found.live) + 4 * max(
        REDUCE_BUCKET_NUMEL, largest
    )


@pytest.mark.parametrize(
    ("gpus", "expert_parallel", "stage", "states_gb"),
    [
        (8, 8, 1, 191.7),
        (16, 16, 1, 102.9),
        (32, 8, 2, 63.9),
        (64, 8, 1, 87.1),
        (64, 8, 2, 44.0),
        (64, 32, 1, 43.6),
        (64, 8, 3, 22.4),
        (1024, 8, 1, 73.1),
    ],
)
def test_80b_states_against_independent_table(gpus: int, expert_parallel: int, stage: Stage, states_gb: float) -> None:
    """Weights 2, gradients 4, optimizer 12 bytes a parameter, 79.67 B parameters without MTP.

    The table has every weight in bf16: the fp32 routers (0.10 GB whole) are what may be above it, and under
    stage 3 the small parameters that stay gathered.
    """
    memory = memory_per_gpu(QWEN3_NEXT_80B_WITHOUT_MTP, Layout(gpus, expert_parallel, stage, "bf16", 1, 4096))
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert 0 <= states / 1e9 - states_gb + 0.05 < 0.2


def test_total_covers_weights_and_runtime() -> None:
    """Every part is a non-negative integer."""
    memory = memory_per_gpu(QWEN3_NEXT_80B, Layout(64, 8, 1, "bf16", 1, 4096))
    assert all(isinstance(size, int) and size >= 0 for size in memory.values())
    assert memory["runtime"] == RUNTIME_BYTES


def test_step_copy_counts_only_beyond_activations() -> None:
    """With one token the optimizer step is the fullest moment, with many the backward pass is."""
    layout = Layout(64, 8, 1, "bf16", 1, 1, offload_optimizer=True)
    small = memory_per_gpu(QWEN3_NEXT_80B, layout)
    large = memory_per_gpu(QWEN3_NEXT_80B, replace(layout, sequence_length=4096))
    activations = sum(activation_bytes(QWEN3_NEXT_80B, layout).values())
    states = memory_per_gpu(QWEN3_NEXT_80B, replace(layout, offload_optimizer=False))["optimizer"]
    assert small["optimizer_step"] == max(0, states // 3 - activations)
    assert small["optimizer_step"] > 0
    assert large["optimizer_step"] == 0
    for stage in (1, 2, 3):
        flat = memory_per_gpu(QWEN3_NEXT_80B, Layout(64, 8, stage, "bf16", 1, 1))
        assert flat["optimizer_step"] == 0, "the sums are flat already"


@pytest.mark.parametrize(("world", "expert_parallel"), [(8, 3), (12, 3)])
def test_impossible_expert_parallel_size(world: int, expert_parallel: int) -> None:
    """3 divides neither 8 ranks nor 4 experts."""
    with pytest.raises(ConfigError, match="expert_parallel_size: 3"):
        memory_per_gpu(TINY, replace(ONE, world_size=world, expert_parallel_size=expert_parallel))


def test_weights_have_to_fit_before_stage_3_partitions_them() -> None:
    """Without expert parallelism that is the whole model, however many ranks share it later."""
    alone = memory_per_gpu(QWEN3_NEXT_80B, replace(ONE, world_size=256, zero_stage=3, precision="bf16"))
    total = sum(spec.numel * (4 if spec.fp32 else 2) for spec in parameter_table(QWEN3_NEXT_80B))
    assert sum(alone.values()) == total + RUNTIME_BYTES
    shared = memory_per_gpu(QWEN3_NEXT_80B, replace(ONE, world_size=256, expert_parallel_size=64, zero_stage=3))
    assert shared["building"] == 0


@pytest.mark.parametrize(
    ("gpus", "expert_parallel_size", "exchange", "peak_gib"),
    [(1, 1, "exact", 52.9), (4, 4, "exact", 46.7), (4, 4, "dense", 47.8), (4, 2, "exact", 55.7), (4, 2, "dense", 56.8)],
)
def test_measured_peaks(gpus: int, expert_parallel_size: int, exchange: str, peak_gib: float) -> None:
    """docs/benchmarks/whole-steps.md, slice4_e512 on H100: the plan is above the peak of tensors, by less than 5 %."""
    overrides = {
        "model.num_experts": 128 if gpus == 1 else 512,
        "parallel.expert_parallel_size": expert_parallel_size,
        "parallel.token_exchange": exchange,
        "run.global_batch_size": 4 * gpus,
    }
    named = [(key, str(value)) for key, value in overrides.items()]
    config = load_config([find_config("bench_slice4_e512.yaml")], named).config
    parts = memory_per_gpu(config.model, Layout.of(config, gpus, ranks_per_node=gpus))
    planned = (sum(parts.values()) - parts["runtime"]) / 2**30
    assert peak_gib <= planned <= 1.05 * peak_gib
