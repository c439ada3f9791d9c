"""Routing by Triton kernels: a pass over the logits each way.

A program takes a few tokens of one row, finds the K largest of their logits one after the other, and adds up what the
router losses need; a second kernel adds up the programs' sums in a fixed order. bf16 activations meet fp32 weights by
``exact_products``, fp32 ones by torch.

Saved for the backward pass: x, the weights, fp32 logits ``[T, E]``, their log-sum-exp, chosen experts and weights.

Letters: T tokens, D hidden, E experts, K experts per token, r rows, S tokens per row, B programs per row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.routing import Routing
from qwen3next_train.kernels.triton.exact_products import (
    NUM_PARTS,
    grad_of_weight,
    grad_of_x,
    logit_parts,
    split_in_three,
)
from qwen3next_train.kernels.triton.row_programs import ceil_div, next_power_of_2

_TILE = 512
"""Logits that a warp holds at once, as whole tokens."""
_TOKENS_PER_PROGRAM = 8


def top_k_routing_triton(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
    num_rows: int,
    with_z_grad: bool,
) -> Routing:
    """Of equal experts the first is taken. ``x_TD`` is bf16 or fp32."""
    return Routing(*_Route.apply(x_TD, weight_ED, top_k, renormalize, num_rows, with_z_grad))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_ED: torch.Tensor,
        top_k: int,
        renormalize: bool,
        num_rows: int,
        with_z_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        num_tokens, num_experts = x_TD.shape[0], weight_ED.shape[0]
        is_split = x_TD.dtype == torch.bfloat16
        parts = logit_parts(x_TD, weight_ED) if is_split else x_TD @ weight_ED.to(x_TD.dtype).t()
        logits_TE = parts.new_empty(num_tokens, num_experts) if is_split else parts
        normalizer_T = parts.new_empty(num_tokens)
        weights_TK = parts.new_empty(num_tokens, top_k)
        ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=x_TD.device)
        row_tokens = num_tokens // num_rows
        blocks = ceil_div(row_tokens, _TOKENS_PER_PROGRAM)
        sums = (
            parts.new_empty(num_rows * blocks, num_experts),
            torch.empty(num_rows * blocks, num_experts, dtype=torch.int32, device=x_TD.device),
            parts.new_empty(num_rows * blocks, 2),
        )
        sizes = _sizes(num_experts, top_k, renormalize)
        _route[(num_rows, blocks)](
            parts,
            logits_TE,
            normalizer_T,
            weights_TK,
            ids_TK,
            *sums,
            row_tokens,
            num_experts,
            PARTS=NUM_PARTS if is_split else 1,
            TILES=ceil_div(_TOKENS_PER_PROGRAM, sizes["TOKENS"]),
            **sizes,
        )
        stats = _add_up(sums, num_rows, blocks, row_tokens)
        ctx.save_for_backward(x_TD, weight_ED, logits_TE, normalizer_T, weights_TK, ids_TK)
        ctx.options = (renormalize, num_rows, with_z_grad)
        mean_prob_rE, counts_rE, z, entropy = stats
        ctx.mark_non_differentiable(ids_TK, counts_rE, entropy, *(() if with_z_grad else (z,)))
        return weights_TK, ids_TK, mean_prob_rE, counts_rE, z, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_ED, logits_TE, normalizer_T, weights_TK, ids_TK = ctx.saved_tensors
        renormalize, num_rows, with_z_grad = ctx.options
        num_tokens, num_experts = logits_TE.shape
        grad_weights_TK, _, grad_mean_prob_rE, _, grad_z, _ = grads
        is_split = x_TD.dtype == torch.bfloat16
        grad_logits = x_TD.new_empty(num_tokens, (4 if is_split else 1) * num_experts)
        row_tokens = num_tokens // num_rows
        sizes = _sizes(num_experts, ids_TK.shape[1], renormalize)
        _route_backward[(num_rows, ceil_div(row_tokens, sizes["TOKENS"]))](
            logits_TE,
            normalizer_T,
            weights_TK,
            ids_TK,
            grad_weights_TK.contiguous(),
            grad_mean_prob_rE.contiguous(),
            grad_z if with_z_grad else None,
            grad_logits,
            row_tokens,
            num_tokens,
            num_experts,
            SPLIT=is_split,
            WITH_Z=with_z_grad,
            **sizes,
        )
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_of_x(grad_logits, weight_ED) if is_split else grad_logits @ weight_ED.to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_of_weight(grad_logits, x_TD) if is_split else grad_logits.t() @ x_TD
            grad_weight = grad_weight.to(weight_ED.dtype)
        return grad_x, grad_weight, None, None, None, None


def _add_up(
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor], num_rows: int, blocks: int, row_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean probabilities, counts, z and entropy from the programs' sums."""
    probs, counts, scalars = sums
    num_experts = probs.shape[1]
    mean_prob_rE = probs.new_empty(num_rows, num_experts)
    counts_rE = torch.empty(num_rows, num_experts, dtype=torch.int64, device=probs.device)
    z, entropy = probs.new_empty(()), probs.new_empty(())
    _sum_programs[(num_rows, ceil_div(num_experts, 32))](
        probs,
        counts,
        scalars,
        mean_prob_rE,
        counts_rE,
        z,
        entropy,
        blocks,
        row_tokens,
        num_experts,
        BLOCKS=64,
        EXPERTS=32,
    )
    return mean_prob_rE, counts_rE, z, entropy


def _sizes(num_experts: int, top_k: int, renormalize: bool) -> dict[str, int]:
    """Compile-time sizes. One warp a program: no step of the search for the largest waits for another warp."""
    experts = next_power_of_2(num_experts)
    return {
        "TOP_K": top_k,
        "RENORMALIZE": renormalize,
        "TOKENS": max(1, min(_TOKENS_PER_PROGRAM, _TILE // experts)),
        "EXPERTS": experts,
        "CHOICES": next_power_of_2(top_k),
        "num_warps": max(1, min(8, experts // _TILE)),
    }


@triton.jit
def _route(
    parts,
    logits,
    normalizer,
    weights,
    ids,
    prob_sums,
    counts,
    scalars,
    row_tokens,
    num_experts,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Route the tokens of one block of one row and add up their statistics."""
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    expert = tl.arange(0, EXPERTS)[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    prob_sum = tl.zeros([EXPERTS], dtype=tl.float32)
    count = tl.zeros([EXPERTS], dtype=tl.int32)
    square_sum = tl.zeros([TOKENS], dtype=tl.float32)
    entropy_sum = tl.zeros([TOKENS], dtype=tl.float32)
    for tile in range(TILES):
        within = (tl.program_id(1) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        exists = within < row_tokens
        token = tl.program_id(0).to(tl.int64) * row_tokens + within
        mask = exists[:, None] & (expert < num_experts)
        logit = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            place = token[:, None] * (PARTS * num_experts) + part * num_experts + expert
            logit += tl.load(parts + place, mask=mask, other=0)
        if PARTS > 1:
            tl.store(logits + token[:, None] * num_experts + expert, logit, mask=mask)
        remaining = tl.where(expert < num_experts, logit, float("-inf"))
        largest = tl.max(remaining, axis=1)
        power = tl.exp(remaining - largest[:, None])
        total = tl.sum(power, axis=1)
        log_total = largest + tl.log(total)
        prob = tl.where(mask, power / total[:, None], 0)
        tl.store(normalizer + token, log_total, mask=exists)
        prob_sum += tl.sum(prob, axis=0)
        square_sum += tl.where(exists, log_total * log_total, 0)
        entropy_sum += tl.where(exists, log_total - tl.sum(prob * logit, axis=1), 0)
        chosen_id = tl.zeros([TOKENS, CHOICES], dtype=tl.int32)
        chosen_weight = tl.zeros([TOKENS, CHOICES], dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            best, best_id = tl.max(remaining, axis=1, return_indices=True)
            # Where a logit is not a number nothing is larger than anything; ids stay within bounds all the same.
            best_id = tl.minimum(best_id, num_experts - 1)
            is_best = expert == best_id[:, None]
            count += tl.sum((is_best & mask).to(tl.int32), axis=0)
            remaining = tl.where(is_best, float("-inf"), remaining)
            chosen_id = tl.where(choice == k, best_id[:, None], chosen_id)
            chosen_weight = tl.where(choice == k, (tl.exp(best - largest) / total)[:, None], chosen_weight)
        if RENORMALIZE:
            chosen_weight = chosen_weight / tl.sum(chosen_weight, axis=1)[:, None]
        chosen = token[:, None] * TOP_K + choice
        tl.store(ids + chosen, chosen_id.to(tl.int64), mask=exists[:, None] & (choice < TOP_K))
        tl.store(weights + chosen, chosen_weight, mask=exists[:, None] & (choice < TOP_K))
    column = tl.arange(0, EXPERTS)
    place = program * num_experts + column
    tl.store(prob_sums + place, prob_sum, mask=column < num_experts)
    tl.store(counts + place, count, mask=column < num_experts)
    tl.store(scalars + program * 2, tl.sum(square_sum, axis=0))
    tl.store(scalars + program * 2 + 1, tl.sum(entropy_sum, axis=0))


@triton.jit
def _sum_programs(
    prob_sums,
    counts,
    scalars,
    mean_prob,
    total_counts,
    z,
    entropy,
    num_blocks,
    row_tokens,
    num_experts,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Add up a row's programs for some experts, and in the first program z and entropy of all rows."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    prob = tl.zeros([BLOCKS, EXPERTS], dtype=tl.float32)
    count = tl.zeros([BLOCKS, EXPERTS], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        place = (row * num_blocks + block)[:, None] * num_experts + expert[None, :]
        mask = (block < num_blocks)[:, None] & (expert < num_experts)[None, :]
        prob += tl.load(prob_sums + place, mask=mask, other=0)
        count += tl.load(counts + place, mask=mask, other=0)
    inside = expert < num_experts
    tl.store(mean_prob + row * num_experts + expert, tl.sum(prob, axis=0) / row_tokens, mask=inside)
    tl.store(total_counts + row * num_experts + expert, tl.sum(count, axis=0).to(tl.int64), mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        num_programs = num_blocks * tl.num_programs(0)
        squares = tl.zeros([1024], dtype=tl.float32)
        entropies = tl.zeros([1024], dtype=tl.float32)
        for first in range(0, num_programs, 1024):
            program = first + tl.arange(0, 1024)
            squares += tl.load(scalars + program * 2, mask=program < num_programs, other=0)
            entropies += tl.load(scalars + program * 2 + 1, mask=program < num_programs, other=0)
        num_tokens = row_tokens * tl.num_programs(0)
        tl.store(z, tl.sum(squares, axis=0) / num_tokens)
        tl.store(entropy, tl.sum(entropies, axis=0) / num_tokens)


@triton.jit
def _route_backward(
    logits,
    normalizer,
    weights,
    ids,
    grad_weights,
    grad_mean_prob,
    grad_z,
    grad_logits,
    row_tokens,
    num_tokens,
    num_experts,
    SPLIT: tl.constexpr,
    WITH_Z: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Gradients of some tokens' logits, in fp32 or as the bf16 parts (high, high, middle, low)."""
    within = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    exists = within < row_tokens
    token = tl.program_id(0).to(tl.int64) * row_tokens + within
    expert = tl.arange(0, EXPERTS)[None, :]
    mask = exists[:, None] & (expert < num_experts)
    log_total = tl.load(normalizer + token, mask=exists, other=0)
    logit = tl.load(logits + token[:, None] * num_experts + expert, mask=mask, other=float("-inf"))
    prob = tl.exp(logit - log_total[:, None])
    mean_place = grad_mean_prob + tl.program_id(0).to(tl.int64) * num_experts + expert
    grad_prob = tl.load(mean_place, mask=expert < num_experts, other=0) / row_tokens
    # The chosen experts' probabilities and the gradients that reach them through the weights.
    choice = tl.arange(0, CHOICES)[None, :]
    is_choice = exists[:, None] & (choice < TOP_K)
    chosen = token[:, None] * TOP_K + choice
    chosen_id = tl.load(ids + chosen, mask=is_choice, other=0)
    chosen_logit = tl.load(logits + token[:, None] * num_experts + chosen_id, mask=is_choice, other=float("-inf"))
    chosen_prob = tl.exp(chosen_logit - log_total[:, None])
    slope = tl.load(grad_weights + chosen, mask=is_choice, other=0)
    common = tl.zeros([TOKENS], dtype=tl.float32)
    share = tl.full([TOKENS], 1.0, dtype=tl.float32)
    if RENORMALIZE:
        common = tl.sum(slope * tl.load(weights + chosen, mask=is_choice, other=0), axis=1)
        share = tl.where(exists, tl.sum(chosen_prob, axis=1), 1.0)
    slope = tl.where(is_choice, (slope - common[:, None]) / share[:, None], 0)
    mean_slope = tl.sum(prob * grad_prob, axis=1) + tl.sum(chosen_prob * slope, axis=1)
    z_slope = tl.zeros([TOKENS], dtype=tl.float32)
    if WITH_Z:
        z_slope = tl.load(grad_z) * 2 * log_total / num_tokens
    grad = prob * (grad_prob - mean_slope[:, None]) + prob * z_slope[:, None]
    _store_gradient(grad_logits, grad, token, expert, mask, num_experts, SPLIT)
    # The chosen experts' gradients are written over it: to look for each of them among all experts would be as many
    # passes over all. Nobody may write one before what it replaces.
    tl.debug_barrier()
    mean_place = grad_mean_prob + tl.program_id(0).to(tl.int64) * num_experts + chosen_id
    chosen_grad_prob = tl.load(mean_place, mask=is_choice, other=0) / row_tokens
    grad = chosen_prob * (chosen_grad_prob - mean_slope[:, None]) + chosen_prob * slope
    grad += chosen_prob * z_slope[:, None]
    _store_gradient(grad_logits, grad, token, chosen_id, is_choice, num_experts, SPLIT)


@triton.jit
def _store_gradient(grad_logits, grad, token, expert, mask, num_experts, SPLIT: tl.constexpr):
    """Write some tokens' gradients for some experts, in fp32 or as bf16 parts."""
    if SPLIT:
        high, middle, low = split_in_three(grad)
        place = grad_logits + token[:, None] * (4 * num_experts) + expert
        tl.store(place, high, mask=mask)
        tl.store(place + num_experts, high, mask=mask)
        tl.store(place + 2 * num_experts, middle, mask=mask)
        tl.store(place + 3 * num_experts, low, mask=mask)
    else:
        tl.store(grad_logits + token[:, None] * num_experts + expert, grad, mask=mask)
