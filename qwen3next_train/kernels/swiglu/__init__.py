"""SwiGLU, the activation of the experts: contract of its backends.

A routed row is weighed here, not behind the down projection, which is linear: there the backward pass would need the
projection's output, D wide, and here it needs what it reads anyway.

Letters: R rows, F expert hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SwiGlu(Protocol):
    """What every backend computes."""

    def __call__(self, gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> torch.Tensor:
        """``weight * silu(gate) * up`` of the two halves of each row; differentiable.

        Args:
            gate_up: ``[R, 2F]``, gate first; rows are dense but may lie apart; R may be 0.
            weights_R: ``[R]``, at least fp32; None for 1.

        Returns:
            ``[R, F]``, dense, in the dtype of ``gate_up``.
        """
