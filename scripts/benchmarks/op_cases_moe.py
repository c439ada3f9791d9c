"""Operations of the mixture of experts, at the 80B model's sizes and one micro-batch of 4 x 4096 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from op_case import BF16_BYTES, FP32_BYTES, INT64_BYTES, Inputs, OpCase, Outputs, Work, normal

from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.kernels.selection import KernelSet

TOKENS, HIDDEN, EXPERTS, TOP_K, FFN = 16384, 2048, 512, 10, 512
ROWS = TOKENS * TOP_K


def moe_cases() -> Iterator[OpCase]:
    """All cases."""
    yield routing()
    yield sort_and_permute()
    yield grouped_matmul()
    yield swiglu()
    yield unpermute()
    yield shared_expert_combine()
    yield shared_input()


def routing() -> OpCase:
    """Logits, softmax, the K largest and the statistics; the products count once, however often they are done."""

    def inputs(device: torch.device) -> Inputs:
        weight_ED = normal(device, EXPERTS, HIDDEN, dtype=torch.float32) * HIDDEN**-0.5
        return {"x_TD": normal(device, TOKENS, HIDDEN), "weight_ED": weight_ED}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        routed = kernels.top_k_routing(**inputs, top_k=TOP_K, renormalize=True, num_rows=4, with_z_grad=True)
        return routed.weights_TK, routed.mean_prob_rE, routed.z

    flops = 2 * TOKENS * HIDDEN * EXPERTS
    num_bytes = BF16_BYTES * TOKENS * HIDDEN + FP32_BYTES * EXPERTS * HIDDEN
    chosen = (FP32_BYTES + INT64_BYTES) * ROWS
    return OpCase("routing", inputs, run, Work(num_bytes + chosen, flops), Work(2 * num_bytes + chosen, 2 * flops))


def sort_and_permute() -> OpCase:
    """Order of the routed rows, their copies and weights."""

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        order = kernels.token_permutation.sort(inputs["ids_TK"], EXPERTS, ROWS)
        rows_RD = kernels.token_permutation.permute(inputs["x_TD"], order)
        return rows_RD, kernels.token_permutation.permute_weights(inputs["weights_TK"], order)

    def inputs(device: torch.device) -> Inputs:
        weights_TK = torch.rand(TOKENS, TOP_K, device=device)
        return {"x_TD": normal(device, TOKENS, HIDDEN), "ids_TK": _choices(device), "weights_TK": weights_TK}

    copies = BF16_BYTES * (TOKENS + ROWS) * HIDDEN
    order, weights = INT64_BYTES * ROWS, 2 * FP32_BYTES * ROWS
    return OpCase("sort and permute", inputs, run, Work(copies + weights + 3 * order), Work(copies + weights + order))


def unpermute() -> OpCase:
    """Sum of each token's rows."""

    def inputs(device: torch.device) -> Inputs:
        order = TokenPermutation().sort(_choices(device), EXPERTS, ROWS)
        return {"rows_RD": normal(device, ROWS, HIDDEN), **vars(order)}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        order = Permutation(inputs["token_R"], inputs["row_TK"], inputs["counts_E"])
        return (kernels.token_permutation.unpermute(inputs["rows_RD"], order),)

    work = Work(BF16_BYTES * (ROWS + TOKENS) * HIDDEN + INT64_BYTES * ROWS)
    return OpCase("unpermute", inputs, run, work, work)


def _choices(device: torch.device) -> torch.Tensor:
    """Random different experts for each token, int64 ``[T, K]``."""
    return torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K).indices


def swiglu() -> OpCase:
    """Activation of the routed rows, weighted."""
    product, weights = BF16_BYTES * ROWS * FFN, FP32_BYTES * ROWS
    return OpCase(
        "SwiGLU",
        lambda device: {"gate_up": normal(device, ROWS, 2 * FFN), "weights_R": torch.rand(ROWS, device=device)},
        lambda kernels, inputs: (kernels.swiglu(**inputs),),
        Work(3 * product + weights),
        Work(5 * product + 2 * weights),
    )


def shared_expert_combine() -> OpCase:
    """The outputs of shared and routed experts added to the residual; the sum's gradient is passed on as it is."""
    names = ("residual_TD", "base_TD", "branch_TD", "x_TD")

    def inputs(device: torch.device) -> Inputs:
        return {
            **{name: normal(device, TOKENS, HIDDEN) for name in names},
            "weight_1D": normal(device, 1, HIDDEN) * HIDDEN**-0.5,
        }

    size = BF16_BYTES * TOKENS * HIDDEN
    return OpCase(
        "gated addition",
        inputs,
        lambda kernels, x: (kernels.shared_expert_combine(**x),),
        Work(5 * size),
        Work(5 * size),
    )


def shared_input() -> OpCase:
    """Sum of the gradients of the block's input; nothing happens in the forward pass."""
    size = BF16_BYTES * TOKENS * HIDDEN
    return OpCase(
        "fan out to four",
        lambda device: {"x": normal(device, TOKENS, HIDDEN)},
        lambda kernels, inputs: kernels.shared_input(inputs["x"], 4),
        Work(0),
        Work(5 * size),
    )


def grouped_matmul() -> OpCase:
    """Gate and up projection of all experts, every expert with the same number of rows."""
    num_in, num_out = HIDDEN, 2 * FFN

    def inputs(device: torch.device) -> Inputs:
        return {
            "x_RI": normal(device, ROWS, num_in),
            "weight_eOI": normal(device, EXPERTS, num_out, num_in) * num_in**-0.5,
            "counts_e": torch.full((EXPERTS,), ROWS // EXPERTS, device=device),
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return (kernels.grouped_matmul(inputs["x_RI"], inputs["weight_eOI"], counts_e=inputs["counts_e"]),)

    flops = 2 * ROWS * num_in * num_out
    num_bytes = BF16_BYTES * (ROWS * (num_in + num_out) + EXPERTS * num_in * num_out)
    return OpCase("grouped matmul, gate and up", inputs, run, Work(num_bytes, flops), Work(2 * num_bytes, 2 * flops))
