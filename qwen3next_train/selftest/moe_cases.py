"""Cases of the mixture of experts' operations, their definitions written out.

Letters: those of the operations' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from qwen3next_train.kernels.routing import TokenPermutation
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.selftest.case import Case, Outputs, RandomInputs


def grouped_matmul(
    random: RandomInputs, counts: Sequence[int], num_in: int, num_out: int, *, unused_rows: int = 0
) -> Case:
    """Rows of each expert, as many as ``counts`` says, times its weight; behind them room that holds NaN."""
    counts_e = torch.tensor(counts, device=random.device)
    inputs = {
        "x_RI": random.normal(sum(counts), num_in),
        "weight_eOI": random.normal(len(counts), num_out, num_in) * num_in**-0.5,
    }

    def run(kernels: KernelSet, x_RI: torch.Tensor, weight_eOI: torch.Tensor) -> Outputs:
        if unused_rows:
            x_RI = torch.cat([x_RI, x_RI.new_full((unused_rows, num_in), torch.nan)])
        out_RO = kernels.grouped_matmul(x_RI=x_RI, weight_eOI=weight_eOI, counts_e=counts_e)
        return (out_RO[: sum(counts)],)

    return Case(inputs, run, partial(_plain_grouped_matmul, counts=counts))


def random_experts(random: RandomInputs, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Different experts for each token, int64 ``[T, K]``."""
    return random.uniform(num_tokens, num_experts).argsort(dim=1)[:, :top_k]


def permute(random: RandomInputs, ids_TK: torch.Tensor, num_experts: int, hidden: int, *, back: bool = False) -> Case:
    """Order of the routed rows, their copies and weights, and with ``back`` the sums of the copies; -1 is no expert."""
    num_tokens, num_routed = len(ids_TK), int((ids_TK >= 0).sum())
    inputs = {"x_TD": random.normal(num_tokens, hidden), "weights_TK": random.uniform(*ids_TK.shape)}

    def run(kernels: KernelSet, x_TD: torch.Tensor, weights_TK: torch.Tensor) -> Outputs:
        permutation = kernels.token_permutation.sort(ids_TK, num_experts, num_routed)
        rows_RD = kernels.token_permutation.permute(x_TD, permutation)
        weights_R = kernels.token_permutation.permute_weights(weights_TK, permutation)
        sums = (kernels.token_permutation.unpermute(rows_RD, permutation),) if back else ()
        return rows_RD, weights_R, *sums

    def definition(x_TD: torch.Tensor, weights_TK: torch.Tensor) -> Outputs:
        tokens, pairs = x_TD.unbind(0), _pairs(ids_TK)
        weights = [weights_TK[token, k] for _, token, k in pairs]
        sums = (x_TD * (ids_TK >= 0).sum(1, keepdim=True),) if back else ()
        return torch.stack([tokens[token] for _, token, _ in pairs]), torch.stack(weights), *sums

    return Case(inputs, run, definition, frozenset({"weights_TK"}))


def unpermute(random: RandomInputs, ids_TK: torch.Tensor, num_experts: int, hidden: int) -> Case:
    """Sum of each token's rows; -1 is no expert."""
    num_routed = int((ids_TK >= 0).sum())
    permutation = TokenPermutation().sort(ids_TK, num_experts, num_routed)

    def run(kernels: KernelSet, rows_RD: torch.Tensor) -> Outputs:
        return (kernels.token_permutation.unpermute(rows_RD, permutation),)

    def definition(rows_RD: torch.Tensor) -> Outputs:
        sums = [rows_RD.new_zeros(hidden)] * len(ids_TK)
        for row, (_, token, _) in zip(rows_RD.unbind(0), _pairs(ids_TK), strict=True):
            sums[token] = sums[token] + row
        return (torch.stack(sums),)

    return Case({"rows_RD": random.normal(num_routed, hidden)}, run, definition)


def top_k_routing(
    random: RandomInputs,
    num_tokens: int,
    hidden: int,
    num_experts: int,
    *,
    top_k: int,
    renormalize: bool,
    num_rows: int,
    with_z_grad: bool = True,
) -> Case:
    """What has a gradient of the routing: weights, mean probabilities and, with ``with_z_grad``, the z statistic."""
    inputs = {
        "x_TD": random.normal(num_tokens, hidden),
        "weight_ED": random.normal(num_experts, hidden) * hidden**-0.5,
    }

    def run(kernels: KernelSet, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> Outputs:
        routing = kernels.top_k_routing(
            x_TD, weight_ED, top_k=top_k, renormalize=renormalize, num_rows=num_rows, with_z_grad=with_z_grad
        )
        return routing.weights_TK, routing.mean_prob_rE, *((routing.z,) if with_z_grad else ())

    def definition(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> Outputs:
        powers_TE = (x_TD @ weight_ED.t()).exp()
        totals_T1 = powers_TE.sum(1, keepdim=True)
        probs_TE = powers_TE / totals_T1
        largest_TK = probs_TE.sort(1, descending=True).values[:, :top_k]
        weights_TK = largest_TK / largest_TK.sum(1, keepdim=True) if renormalize else largest_TK
        mean_prob_rE = torch.stack([part.mean(0) for part in probs_TE.chunk(num_rows)])
        return weights_TK, mean_prob_rE, *((totals_T1.log().square().mean(),) if with_z_grad else ())

    return Case(inputs, run, definition, frozenset({"weight_ED"}))


def swiglu(random: RandomInputs, num_rows: int, features: int, *, weighted: bool) -> Case:
    """SwiGLU of gate and up projection, its rows weighted or not."""
    inputs = {"gate_up": 2 * random.normal(num_rows, 2 * features)}
    if weighted:
        inputs["weights_R"] = random.uniform(num_rows)

    def definition(gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> Outputs:
        gate, up = gate_up[:, :features], gate_up[:, features:]
        product = gate / (1 + (-gate).exp()) * up
        return (product if weights_R is None else product * weights_R.unsqueeze(1),)

    return Case(inputs, lambda kernels, **inputs: (kernels.swiglu(**inputs),), definition, frozenset({"weights_R"}))


def shared_expert_combine(random: RandomInputs, num_tokens: int, hidden: int) -> Case:
    """The outputs of shared and routed experts added to the residual; the gate's logits have unit variance."""
    inputs = {name: random.normal(num_tokens, hidden) for name in ("residual_TD", "base_TD", "branch_TD", "x_TD")}
    inputs["weight_1D"] = random.normal(1, hidden) * hidden**-0.5

    def definition(
        residual_TD: torch.Tensor,
        base_TD: torch.Tensor,
        branch_TD: torch.Tensor,
        x_TD: torch.Tensor,
        weight_1D: torch.Tensor,
    ) -> Outputs:
        logit_T1 = (x_TD * weight_1D).sum(1, keepdim=True)
        return (residual_TD + base_TD + branch_TD / (1 + (-logit_T1).exp()),)

    return Case(inputs, lambda kernels, **inputs: (kernels.shared_expert_combine(**inputs),), definition)


def shared_input(random: RandomInputs, num_tokens: int, hidden: int, count: int) -> Case:
    """One tensor for ``count`` readers."""
    return Case(
        {"x": random.normal(num_tokens, hidden)},
        lambda kernels, x: kernels.shared_input(x, count=count),
        lambda x: tuple(1 * x for _ in range(count)),
    )


def _pairs(ids_TK: torch.Tensor) -> list[tuple[int, int, int]]:
    """Expert, token and place among the token's experts of every routed row, in order."""
    places = enumerate(ids_TK.tolist())
    return sorted((expert, token, k) for token, ids in places for k, expert in enumerate(ids) if expert >= 0)


def _plain_grouped_matmul(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts: Sequence[int]) -> Outputs:
    experts = torch.repeat_interleave(torch.tensor(counts)).tolist()
    weights = weight_eOI.unbind(0)
    return (torch.stack([weights[expert] @ row for expert, row in zip(experts, x_RI.unbind(0), strict=True)]),)
