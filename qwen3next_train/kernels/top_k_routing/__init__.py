"""Router of a mixture of experts: logits, softmax, the K largest, and what the router losses need of them.

Letters: T tokens, D hidden, E experts, K experts per token, r rows of the micro-batch, S = T / r tokens per row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Routing(NamedTuple):
    """What one router decided for one micro-batch.

    Args:
        weights_TK: fp32 ``[T, K]``, weights of the chosen experts, largest first; differentiable.
        ids_TK: int64 ``[T, K]``, chosen experts; which of equal ones is left open.
        mean_prob_rE: fp32 ``[r, E]``, mean softmax probability of each expert over the row; differentiable.
        counts_rE: int64 ``[r, E]``, tokens sent to each expert.
        z: fp32 scalar, mean over tokens of ``logsumexp(logits) ** 2``; differentiable on demand.
        entropy: fp32 scalar, mean entropy of the probabilities in nats; detached.
    """

    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    mean_prob_rE: torch.Tensor
    counts_rE: torch.Tensor
    z: torch.Tensor
    entropy: torch.Tensor


class TopKRouting(Protocol):
    """What every backend computes; nothing here waits for the device."""

    def __call__(
        self,
        x_TD: torch.Tensor,
        weight_ED: torch.Tensor,
        *,
        top_k: int,
        renormalize: bool,
        num_rows: int,
        with_z_grad: bool,
    ) -> Routing:
        """Route tokens; logits ``x weight^T`` and all that follows are accurate to at least fp32.

        Args:
            x_TD: ``[T, D]``, any floating dtype.
            weight_ED: ``[E, D]``.
            top_k: K.
            renormalize: divide the K weights by their sum.
            num_rows: r, a divisor of T.
            with_z_grad: let gradients flow through ``z``.
        """
