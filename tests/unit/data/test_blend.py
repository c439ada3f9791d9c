from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_train.data.blend import Blend

WEIGHTS = st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=2, max_size=80)


@given(weights=WEIGHTS, number=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_counts_never_fall_and_follow_the_weights(weights: list[float], number: int) -> None:
    blend = Blend(weights, seed=1)
    before, after = blend.counts_before_block(number), blend.counts_before_block(number + 1)
    assert sum(before) == number * blend.block_size
    assert sum(after) - sum(before) == blend.block_size
    assert all(low <= high for low, high in zip(before, after, strict=True))
    exact = [Fraction(repr(weight)) for weight in weights]
    heaviest = exact.index(max(exact))
    for source, share in enumerate(exact):
        error = before[source] - number * blend.block_size * share / sum(exact)
        assert 0 <= error < len(weights) if source == heaviest else -1 < error <= 0


@given(weights=WEIGHTS.filter(lambda weights: len(weights) < 9), seed=st.integers(0, 2**64))
@settings(max_examples=15, deadline=None)
def test_no_sample_of_a_source_is_skipped_repeated_or_overtaken(weights: list[float], seed: int) -> None:
    blend = Blend(weights, seed=seed)
    next_index = [0] * len(weights)
    for sample in range(2 * blend.block_size + 10):
        source, index = blend.locate(sample)
        assert index == next_index[source]
        next_index[source] += 1


def test_any_start_gives_the_same_samples() -> None:
    weights = [0.7, 0.2, 0.1]
    reference = Blend(weights, seed=5)
    expected = {sample: reference.locate(sample) for sample in range(12_500)}
    for sample in (12_499, 0, 4095, 4096, 8191, 8192, 1, 12_288):
        assert Blend(weights, seed=5).locate(sample) == expected[sample]


def test_weights_are_decimal_numbers() -> None:
    blend = Blend([0.1, 0.2], seed=0)
    assert blend.counts_before_block(3 * 10**12) == [10**12 * 4096, 2 * 10**12 * 4096]


def test_blocks_grow_with_the_number_of_sources() -> None:
    assert Blend([1.0] * 64, seed=0).block_size == 4096
    assert Blend([1.0] * 65, seed=0).block_size == 8192
    assert Blend([1.0] * 300, seed=0).block_size >= 300**2


def test_order_never_changes() -> None:
    blend = Blend([3.0, 1.0], seed=1234)
    assert [blend.locate(sample)[0] for sample in range(24)] == [
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
    ]
    assert blend.locate(10**12) == (0, 750000000000)


def test_one_source_takes_everything() -> None:
    assert Blend([0.3], seed=1).locate(987_654_321_000) == (0, 987_654_321_000)


def test_orders_differ_between_seeds_and_blocks() -> None:
    def pattern(seed: int, first: int) -> list[int]:
        blend = Blend([1.0, 1.0], seed=seed)
        return [blend.locate(first + slot)[0] for slot in range(100)]

    assert len({tuple(pattern(seed, first)) for seed in (1, 2) for first in (0, 4096)}) == 4


@pytest.mark.parametrize("weights", [[1.0, 1e-9], [1e-9, 1.0]])
def test_tiny_weights_are_served_in_the_end(weights: list[float]) -> None:
    counts = Blend(weights, seed=0).counts_before_block(10**7)
    assert min(counts) == 40


def test_what_each_source_has_received_before_any_sample() -> None:
    blend = Blend([3.0, 1.0, 2.0], seed=5)
    for sample in (0, 1, 17, blend.block_size - 1, blend.block_size, blend.block_size + 3):
        received = [0, 0, 0]
        for earlier in range(sample):
            received[blend.locate(earlier)[0]] += 1
        assert blend.counts_before(sample) == received
    assert Blend([2.0], seed=5).counts_before(12) == [12]
