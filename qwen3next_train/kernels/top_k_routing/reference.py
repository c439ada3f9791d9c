"""Routing in plain torch, fp32 throughout. Letters: those of the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.top_k_routing import Routing


def top_k_routing_reference(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
    num_rows: int,
    with_z_grad: bool,
) -> Routing:
    """See the package for the contract."""
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    logits_TE = F.linear(wide_TD, weight_ED.to(wide_TD.dtype))
    return route_logits(logits_TE, top_k=top_k, renormalize=renormalize, num_rows=num_rows, with_z_grad=with_z_grad)


def route_logits(
    logits_TE: torch.Tensor, *, top_k: int, renormalize: bool, num_rows: int, with_z_grad: bool
) -> Routing:
    """What follows from the logits, fp32 ``[T, E]``."""
    num_experts = logits_TE.shape[1]
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    ids_rX = ids_TK.reshape(num_rows, -1)
    counts_rE = torch.zeros(num_rows, num_experts, dtype=torch.int64, device=ids_rX.device)
    counts_rE.scatter_add_(1, ids_rX, torch.ones_like(ids_rX))
    normalizer_T = torch.logsumexp(logits_TE if with_z_grad else logits_TE.detach(), dim=-1)
    with torch.no_grad():
        entropy = (normalizer_T - (probs_TE * logits_TE).sum(-1)).mean()
    mean_prob_rE = probs_TE.view(num_rows, -1, num_experts).mean(1)
    return Routing(weights_TK, ids_TK, mean_prob_rE, counts_rE, normalizer_T.square().mean(), entropy)
