"""Cases of the mixture of experts' operations, their definitions written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gates import MAX_CONSUMERS
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.selftest.case import NUM_TOKENS, Case, Outputs, RandomInputs, capped


def _grouped_matmul(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    # Of the last three the first has several tiles of rows and of columns, one of them full to the last row; the second
    # more tiles than a device has multiprocessors; the third more rows than a kernel sums up at a time.
    for counts, limit in (
        ((5, 0, 41, 1), 1024),
        ((16, 16, 16, 16), 1024),
        ((300, 128, 0, 7, 700), 512),
        ((260, 18000, 128), 64),
        ((2100, 7), 256),
    ):
        hidden, expert_hidden = capped(model.hidden_size, limit), capped(model.moe_intermediate_size, limit)
        counts_e = torch.tensor(counts, device=random.device)
        inputs = {
            "x_RI": random.normal(sum(counts), hidden),
            "weight_eOI": random.normal(len(counts), expert_hidden, hidden) * hidden**-0.5,
        }

        def kernel(counts_e: torch.Tensor = counts_e, **inputs: torch.Tensor) -> Outputs:
            return (kernels.grouped_matmul(**inputs, counts_e=counts_e),)

        yield Case(inputs, kernel, partial(_plain_grouped_matmul, counts=counts))


def _token_permutation(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    experts, top_k = 5, 3
    ids_TK = torch.stack([random.uniform(experts).argsort()[:top_k] for _ in range(NUM_TOKENS)])
    # Some pairs have no row, as with experts of other ranks.
    ids_TK = ids_TK.where(ids_TK != experts - 1, -1)
    inputs = {
        "x_TD": random.normal(NUM_TOKENS, capped(model.hidden_size)),
        "weights_TK": random.uniform(NUM_TOKENS, top_k),
    }

    def kernel(x_TD: torch.Tensor, weights_TK: torch.Tensor) -> Outputs:
        permutation = kernels.token_permutation.sort(ids_TK, experts, int((ids_TK >= 0).sum()))
        rows_RD = kernels.token_permutation.permute(x_TD, permutation)
        weights_R = kernels.token_permutation.permute_weights(weights_TK, permutation)
        return rows_RD, weights_R, kernels.token_permutation.unpermute(rows_RD, permutation)

    yield Case(inputs, kernel, partial(_plain_token_permutation, ids=ids_TK.tolist()), frozenset({"weights_TK"}))


def _top_k_routing(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    hidden, top_k, rows = capped(model.hidden_size), model.num_experts_per_tok, 2
    inputs = {
        "x_TD": random.normal(NUM_TOKENS, hidden),
        "weight_ED": random.normal(model.num_experts, hidden) * hidden**-0.5,
    }

    def kernel(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> Outputs:
        routing = kernels.top_k_routing(
            x_TD, weight_ED, top_k=top_k, renormalize=model.norm_topk_prob, num_rows=rows, with_z_grad=True
        )
        return routing.weights_TK, routing.mean_prob_rE, routing.z

    def reference(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> Outputs:
        powers_TE = (x_TD @ weight_ED.t()).exp()
        totals_T1 = powers_TE.sum(1, keepdim=True)
        probs_TE = powers_TE / totals_T1
        largest_TK = probs_TE.sort(1, descending=True).values[:, :top_k]
        weights_TK = largest_TK / largest_TK.sum(1, keepdim=True) if model.norm_topk_prob else largest_TK
        return weights_TK, torch.stack([part.mean(0) for part in probs_TE.chunk(rows)]), totals_T1.log().square().mean()

    yield Case(inputs, kernel, reference, frozenset({"weight_ED"}))


def _swiglu(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    features = capped(model.moe_intermediate_size)

    def reference(gate_up: torch.Tensor, weights_R: torch.Tensor | None = None) -> Outputs:
        gate, up = gate_up[:, :features], gate_up[:, features:]
        product = gate / (1 + (-gate).exp()) * up
        return (product if weights_R is None else product * weights_R.unsqueeze(1),)

    inputs = {"gate_up": 2 * random.normal(NUM_TOKENS, 2 * features)}
    yield Case(inputs, lambda gate_up: (kernels.swiglu(gate_up),), reference)
    inputs["weights_R"] = random.uniform(NUM_TOKENS)
    yield Case(inputs, lambda **inputs: (kernels.swiglu(**inputs),), reference, frozenset({"weights_R"}))


def _shared_expert_combine(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    size = capped(model.hidden_size)

    def reference(
        residual_TD: torch.Tensor,
        base_TD: torch.Tensor,
        branch_TD: torch.Tensor,
        x_TD: torch.Tensor,
        weight_1D: torch.Tensor,
    ) -> Outputs:
        logit_T1 = (x_TD * weight_1D).sum(1, keepdim=True)
        return (residual_TD + base_TD + branch_TD / (1 + (-logit_T1).exp()),)

    inputs = {name: random.normal(NUM_TOKENS, size) for name in ("residual_TD", "base_TD", "branch_TD", "x_TD")}
    inputs["weight_1D"] = random.normal(1, size) * size**-0.5
    yield Case(inputs, lambda **inputs: (kernels.shared_expert_combine(**inputs),), reference)


def _shared_input(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for count in range(2, MAX_CONSUMERS + 1):
        yield Case(
            {"x": random.normal(NUM_TOKENS, capped(model.hidden_size))},
            partial(kernels.shared_input, count=count),
            lambda x, count=count: tuple(1 * x for _ in range(count)),
        )


MOE_CASES: dict[str, Callable[[KernelSet, ModelConfig, RandomInputs], Iterator[Case]]] = {
    "grouped_matmul": _grouped_matmul,
    "top_k_routing": _top_k_routing,
    "token_permutation": _token_permutation,
    "swiglu": _swiglu,
    "shared_expert_combine": _shared_expert_combine,
    "shared_input": _shared_input,
}
"""By field of ``KernelSet``."""


def _plain_grouped_matmul(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts: tuple[int, ...]) -> Outputs:
    experts = torch.repeat_interleave(torch.tensor(counts)).tolist()
    weights = weight_eOI.unbind(0)
    return (torch.stack([weights[expert] @ row for expert, row in zip(experts, x_RI.unbind(0), strict=True)]),)


def _plain_token_permutation(x_TD: torch.Tensor, weights_TK: torch.Tensor, *, ids: list[list[int]]) -> Outputs:
    tokens = x_TD.unbind(0)
    pairs = sorted((expert, token) for token, experts in enumerate(ids) for expert in experts if expert >= 0)
    weights = [weights_TK[token, ids[token].index(expert)] for expert, token in pairs]
    num_real_T1 = (torch.tensor(ids, device=x_TD.device) >= 0).sum(1, keepdim=True)
    return torch.stack([tokens[token] for _, token in pairs]), torch.stack(weights), x_TD * num_real_T1
