"""One tensor for several consumers, whose gradients are added up: contract of its backends."""

from __future__ import annotations

from typing import Protocol

import torch

MAX_CONSUMERS = 4


class SharedInput(Protocol):
    """What every backend computes."""

    def __call__(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """``x``, ``count`` times; its gradient is the sum of theirs.

        Args:
            x: any shape; must not be changed in place afterwards.
            count: 2 to :data:`MAX_CONSUMERS`; who needs fewer may leave some of them unused.

        Returns:
            Tensors that share the memory of ``x``.
        """
