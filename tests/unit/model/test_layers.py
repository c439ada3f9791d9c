"""Norms and rotary embedding against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.kernels.norms import RmsNorm, rotate
from qwen3next_train.model.norms import ZeroCenteredRmsNorm
from qwen3next_train.model.rope import rotary_table


def test_norm_with_zero_weight_has_unit_mean_square() -> None:
    norm = ZeroCenteredRmsNorm(16, 1e-6, RmsNorm())
    torch.nn.init.zeros_(norm.weight)
    y = norm(5 * torch.randn(7, 16))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(7), rtol=1e-5, atol=0)
    torch.nn.init.constant_(norm.weight, 0.5)
    torch.testing.assert_close(norm(y), 1.5 * y, rtol=1e-5, atol=1e-6)


def test_norm_computes_bf16_in_fp32() -> None:
    norm = ZeroCenteredRmsNorm(64, 1e-6, RmsNorm()).bfloat16()
    torch.nn.init.constant_(norm.weight, 0.25)
    x = (100 * torch.randn(50, 64)).bfloat16()
    exact = 1.25 * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert float(((norm(x).detach().double() - exact) / exact).abs().max()) <= 2**-8


def test_rotary_angles_are_exact_at_the_end_of_256k_tokens() -> None:
    """In fp32 the product of position and frequency would be off by up to 0.01."""
    positions = torch.tensor([0, 1, 65_537, 262_143])
    table = rotary_table(positions, head_dim=256, fraction=0.25, theta=1e7)
    for t, position in enumerate(positions.tolist()):
        for pair in range(32):
            angle = position * 1e7 ** (-2 * pair / 64)
            assert float(table.cos_T1r[t, 0, pair]) == pytest.approx(math.cos(angle), abs=6e-8)
            assert float(table.sin_T1r[t, 0, pair + 32]) == pytest.approx(math.sin(angle), abs=6e-8)


@pytest.mark.parametrize(("fraction", "rotated"), [(0.25, 4), (0.5, 8), (1.0, 16)])
def test_rotary_turns_pairs_by_position_times_frequency(fraction: float, rotated: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 7, 3000])
    x = torch.randn(4, 2, 16)
    table = rotary_table(positions, head_dim=16, fraction=fraction, theta=100.0)
    y = rotate(x, table.cos_T1r, table.sin_T1r)
    half = rotated // 2
    for t, position in enumerate(positions.tolist()):
        for pair in range(half):
            angle = position * 100.0 ** (-2 * pair / rotated)
            a, b = x[t, :, pair], x[t, :, pair + half]
            torch.testing.assert_close(y[t, :, pair], a * math.cos(angle) - b * math.sin(angle), atol=2e-4, rtol=0)
            expected = b * math.cos(angle) + a * math.sin(angle)
            torch.testing.assert_close(y[t, :, pair + half], expected, atol=2e-4, rtol=0)
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert torch.equal(y[0], x[0])
