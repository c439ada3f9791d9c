"""Load-balancing loss, z-loss and load statistics of the routers.

Everything here is computed from :class:`RouterStats`, which a layer returns; counting over micro-batches
happens in :class:`ExpertLoads` outside the layers, so a layer may be recomputed without counting twice.

Letters: T tokens, r rows of the micro-batch, S = T / r tokens per row, E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Scope = Literal["sequence", "micro_batch", "global"]
Summed = Callable[[], torch.Tensor]
"""A sum over ranks that may still be under way; to be called once."""
ReduceCounts = Callable[[torch.Tensor], Summed]
"""Begins to sum an int64 tensor over the ranks that share a step; may work in place."""


def own_counts(counts: torch.Tensor) -> Summed:
    """The sum over one rank."""
    return lambda: counts


@dataclass(frozen=True)
class RouterStats:
    """What one layer's router did with one micro-batch.

    No tuple, in which ZeRO-3 would look for tensors: at the gradient of each it would ask for the layer's weights.

    Args:
        mean_prob_rE: fp32 ``[r, E]``, mean softmax probability of each expert over the row; differentiable.
        counts_rE: int64 ``[r, E]``, rows sent to each expert.
        z: fp32 scalar, mean over tokens of ``logsumexp(logits) ** 2``; differentiable if the loss is used.
        entropy: fp32 scalar, mean entropy of the probabilities in nats; detached.
    """

    mean_prob_rE: torch.Tensor
    counts_rE: torch.Tensor
    z: torch.Tensor
    entropy: torch.Tensor


def load_balancing_loss(mean_prob_LrE: torch.Tensor, counts_LrE: torch.Tensor) -> torch.Tensor:
    """``sum_e f_e P_e`` per layer, averaged over rows (Switch Transformer, arXiv 2101.03961, eq. 4, times E).

    ``f_e = E * count_e / sum_e count_e`` carries no gradient; perfectly even routing gives 1.

    Args:
        mean_prob_LrE: ``[L, r, E]``, P.
        counts_LrE: ``[L, r, E]``; r = 1 when loads are counted over more than a row.

    Returns:
        fp32 ``[L]``.
    """
    num_experts = counts_LrE.shape[-1]
    counts = counts_LrE.to(mean_prob_LrE.dtype)
    fraction_LrE = num_experts * counts / counts.sum(-1, keepdim=True)
    return (fraction_LrE * mean_prob_LrE).sum(-1).mean(-1)


class ExpertLoads:
    """Expert loads over the scope of the load-balancing loss.

    Args:
        scope: ``sequence``: each row by itself, the same at every layout. ``micro_batch``: all rows of all
            ranks. ``global``: all ranks and the step's micro-batches so far (Megatron-LM's global_aux_loss).
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._running_LrE: torch.Tensor | None = None

    def begin_step(self) -> None:
        """Forget the counts of the previous step."""
        self._running_LrE = None

    def begin(
        self,
        stats: Sequence[RouterStats],
        reduce_counts: ReduceCounts,
        reduce_row_counts: ReduceCounts = own_counts,
    ) -> Summed:
        """Begin to count over the ranks of the scope; one reduction for all these layers together.

        Args:
            stats: of each layer.
            reduce_counts: over the ranks of a step.
            reduce_row_counts: over the ranks that share a row.

        Returns:
            int64 ``[L, r, E]``, r = 1 where loads are counted over more than a row.
        """
        counts_LrE = torch.stack([layer.counts_rE for layer in stats])
        if self.scope == "sequence":
            return reduce_row_counts(counts_LrE)
        return reduce_counts(counts_LrE.sum(1, keepdim=True))

    def losses(self, stats: Sequence[RouterStats], counts: Sequence[Summed]) -> torch.Tensor:
        """Load-balancing loss of each layer, fp32 ``[L]``.

        Of slices of rows it is a slice's share, times their number: linear in the mean probabilities, with counts of
        the whole.

        Args:
            stats: of each layer.
            counts: of :meth:`begin`, which together was given the same layers.
        """
        mean_prob_LrE = torch.stack([layer.mean_prob_rE for layer in stats])
        counts_LrE = torch.cat([summed() for summed in counts])
        if self.scope == "sequence":
            return load_balancing_loss(mean_prob_LrE, counts_LrE)
        if self.scope == "global":
            counts_LrE = counts_LrE if self._running_LrE is None else self._running_LrE + counts_LrE
            self._running_LrE = counts_LrE
        return load_balancing_loss(mean_prob_LrE.mean(1, keepdim=True), counts_LrE)
