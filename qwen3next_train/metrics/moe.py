"""Balance of the experts from their token counts.

Letters: L MoE layers, E experts. "Violation" is MaxVio of Wang et al., *Auxiliary-Loss-Free Load Balancing*
(arXiv 2408.15664): the largest load over the mean load, minus 1.
"""

from __future__ import annotations

import torch

from qwen3next_train.metrics.names import layer_metric


def balance_metrics(counts_LE: torch.Tensor, entropy_L: torch.Tensor, *, with_layers: bool) -> dict[str, float]:
    """Load statistics of one step.

    Args:
        counts_LE: ``[L, E]``, integer or floating point: tokens each expert received, summed over micro-batches
            and ranks. A layer that received nothing counts as balanced, with all its experts dead.
        entropy_L: ``[L]``: entropy of the router's distribution in nats, mean over tokens.
        with_layers: add the statistics of each layer.

    Returns:
        Metrics by name (``metrics.names``).
    """
    assert counts_LE.dim() == 2
    assert entropy_L.shape == counts_LE.shape[:1]
    counts_LE = counts_LE.detach().to("cpu", torch.float64)
    mean_L = counts_LE.mean(dim=1)
    violation_L = torch.where(mean_L > 0, counts_LE.amax(dim=1) / mean_L.clamp_min(1e-300) - 1, 0.0).tolist()
    dead_L = (counts_LE == 0).sum(dim=1).tolist()
    entropies = entropy_L.detach().to("cpu", torch.float64).tolist()
    metrics: dict[str, float] = {
        "moe/max_violation": max(violation_L),
        "moe/dead_experts": sum(dead_L),
        "moe/router_entropy": sum(entropies) / len(entropies),
    }
    if with_layers:
        for layer, (violation, dead, entropy) in enumerate(zip(violation_L, dead_L, entropies, strict=True)):
            metrics[layer_metric(layer, "max_violation")] = violation
            metrics[layer_metric(layer, "dead_experts")] = dead
            metrics[layer_metric(layer, "router_entropy")] = entropy
    return metrics
