"""Output head and cross entropy in one, without ever holding all logits: contract of its backends.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch

IGNORE_INDEX = -100
"""Label of a position without a target (``torch.nn.functional.cross_entropy``'s default)."""


class LinearCrossEntropy(Protocol):
    """What every backend computes."""

    def __call__(self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Sum over real labels of ``-log softmax(hidden @ weight^T)[label]`` in nats.

        Args:
            hidden_TD: ``[T, D]``.
            weight_VD: head weight ``[V, D]``.
            labels_T: int64 ``[T]``, :data:`IGNORE_INDEX` where there is no target.

        Returns:
            fp32 scalar (fp64 for fp64 input); 0 when no label is real.
        """
