"""Partial rotary position embedding (RoFormer, arXiv 2104.09864; half-rotation layout of GPT-NeoX and HF).

Letters: T tokens, N heads, H head dim, r rotated dims (the first of each head), 1 the axis that all heads share,
X = r / 2 pairs of dims that turn together (``turn_T1X`` in the test cases: the pairs' turns as complex numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RotaryTable:
    """Angles of a batch, computed once and shared by all attention layers.

    Args:
        cos_T1r: fp32 ``[T, 1, r]``.
        sin_T1r: fp32 ``[T, 1, r]``, the first half negated, ready for the swapped halves.
    """

    cos_T1r: torch.Tensor
    sin_T1r: torch.Tensor


def rotary_table(positions_T: torch.Tensor, *, head_dim: int, fraction: float, theta: float) -> RotaryTable:
    """Angles ``position * theta ** (-2i / r)`` for the first ``r = int(head_dim * fraction)`` dims.

    Computed in fp64 and rounded once: in fp32 the angle of position 262,143 may be wrong by 0.01.

    Args:
        positions_T: int64 ``[T]``, position inside the document.
        head_dim: H.
        fraction: rotated share of H; r must come out even.
        theta: base of the frequencies.
    """
    rotated = int(head_dim * fraction)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64, device=positions_T.device) / rotated
    angles = positions_T.to(torch.float64).unsqueeze(1) * theta**-exponents
    cos, sin = angles.cos().float(), angles.sin().float()
    return RotaryTable(torch.cat((cos, cos), dim=1).unsqueeze(1), torch.cat((-sin, sin), dim=1).unsqueeze(1))
