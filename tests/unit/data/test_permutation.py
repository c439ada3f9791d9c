from __future__ import annotations

import numpy as np
import pytest

from qwen3next_train.data.permutation import derive_key, permutation_of_power, permuted


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 1025])
def test_every_image_is_met_once(size: int) -> None:
    key = derive_key(7, "rows", size)
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_order_never_changes() -> None:
    key = derive_key(1234, "rows", 0, 0)
    assert [permuted(index, 1000, key) for index in range(8)] == [678, 106, 440, 621, 0, 964, 868, 550]
    assert permuted(12345678901234, 10**15, key) == 405211002159763


def test_whole_permutation_equals_single_images() -> None:
    key = derive_key(3, "blend", 9)
    expected = [permuted(index, 256, key) for index in range(256)]
    assert permutation_of_power(8, key).tolist() == expected


def test_orders_of_different_keys_are_unrelated() -> None:
    size = 512
    orders = [[permuted(index, size, derive_key(1, "rows", 0, epoch)) for index in range(size)] for epoch in range(40)]
    fixed_points = sum(order[index] == index for order in orders for index in range(size))
    assert 15 <= fixed_points <= 75  # one is expected per permutation
    first_images = [order[0] for order in orders]
    assert len(set(first_images)) > 30


def test_images_are_uniform() -> None:
    """Chi-square of where index 0..15 of 16 go over 2,000 keys: 225 degrees of freedom."""
    counts = np.zeros((16, 16))
    for seed in range(2000):
        key = derive_key(seed)
        for index in range(16):
            counts[index, permuted(index, 16, key)] += 1
    chi_square = ((counts - 125) ** 2 / 125).sum()
    assert 150 < chi_square < 310


def test_keys_distinguish_types_and_boundaries() -> None:
    assert derive_key(1, "2") != derive_key("1", 2)
    assert derive_key(12) != derive_key(1, 2)
