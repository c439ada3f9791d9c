"""Sizes on the host are those of Triton's own functions."""

from __future__ import annotations

import triton

from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2


def test_quotients_and_powers_are_triton_s() -> None:
    numbers = [*range(1, 70), 1023, 1024, 1025, 163_840, 2**31 - 1, 2**31, 2**31 + 1]
    assert [next_power_of_2(number) for number in numbers] == [triton.next_power_of_2(number) for number in numbers]
    for divisor in (1, 2, 3, 64, 1000):
        quotients = [ceil_div(number, divisor) for number in [0, *numbers]]
        assert quotients == [triton.cdiv(number, divisor) for number in [0, *numbers]]
