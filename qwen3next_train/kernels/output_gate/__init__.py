"""The sigmoid gate on the output of softmax attention: contract of its backends.

Letters: T tokens, N heads, H head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch


class OutputGate(Protocol):
    """What every backend computes."""

    def __call__(self, x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> torch.Tensor:
        """``x * sigmoid(gate)``.

        Args:
            x_TNH: ``[T, N, H]``.
            gate_TNH: ``[T, N, H]`` of the same dtype; heads may lie apart (a part of a wider projection).

        Returns:
            ``[T, N, H]``.
        """
