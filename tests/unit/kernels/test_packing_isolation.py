"""Convolution, delta rule and attention on random cuts: packed documents equal separate ones, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from qwen3next_train.kernels.attention import varlen_attention_reference
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.gdn_prologue import causal_conv1d_reference
from qwen3next_train.kernels.varlen import VarlenMetadata
from tests.unit.kernels.comparison import largest_error
from tests.unit.kernels.packing import documents, spans

TOLERANCE = 1e-5
SLOW_DECAY = 0.05

Operation = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], VarlenMetadata], torch.Tensor]


def convolution(tokens: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], cuts: VarlenMetadata) -> torch.Tensor:
    return causal_conv1d_reference(tokens[0], weights[0], sequences=cuts)


def delta_rule(tokens: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], cuts: VarlenMetadata) -> torch.Tensor:
    """Gates as a layer makes them, so that A_log is a weight whose gradient can be compared."""
    q, k, v, a, b = tokens
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = -weights[0].exp() * torch.nn.functional.softplus(a)
    return gated_delta_rule_reference(q, k, v, g_TN=g, beta_TN=b.sigmoid(), sequences=cuts)[0]


def attention(tokens: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], cuts: VarlenMetadata) -> torch.Tensor:
    del weights
    return varlen_attention_reference(*tokens, sequences=cuts)


# Per operation: shapes of what each token brings, shapes of its weights.
OPERATIONS: dict[str, tuple[Operation, list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "convolution": (convolution, [(6,)], [(6, 4)]),
    "delta rule": (delta_rule, [(2, 8), (2, 8), (4, 12), (4,), (4,)], [(4,)]),
    "attention": (attention, [(6, 8), (2, 8), (2, 8)], []),
}


def random_lengths(seed: int) -> list[int]:
    """Two to seven documents, one of them a single token and never the first."""
    rng = random.Random(seed)
    lengths = [1, *(rng.choice((1, 2, rng.randint(3, 120))) for _ in range(rng.randint(0, 5)))]
    rng.shuffle(lengths)
    return [rng.randint(2, 120), *lengths]


def inputs_of(name: str, num_tokens: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    _, tokens, weights = OPERATIONS[name]
    made = [torch.randn(num_tokens, *shape, generator=generator) for shape in tokens]
    others = [torch.randn(shape, generator=generator) for shape in weights]
    if name == "delta rule":
        others = [0.1 * others[0] + torch.tensor(SLOW_DECAY).log()]
    return made, others


def run(
    name: str, tokens: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], lengths: list[int], up: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Output, gradients of what tokens bring, gradients of weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*tokens, *weights)]
    out = OPERATIONS[name][0](leaves[: len(tokens)], leaves[len(tokens) :], documents(*lengths))
    gradients = torch.autograd.grad(out, leaves, up)
    return out.detach(), list(gradients[: len(tokens)]), list(gradients[len(tokens) :])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_packed_equals_separate(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    tokens, weights = inputs_of(name, sum(lengths), seed)
    up = torch.randn(OPERATIONS[name][0](tokens, weights, documents(*lengths)).shape)
    out, token_gradients, weight_gradients = run(name, tokens, weights, lengths, up)
    sums = [torch.zeros_like(gradient) for gradient in weight_gradients]
    parts = []
    for span in spans(lengths):
        part = run(name, [x[span] for x in tokens], weights, [span.stop - span.start], up[span])
        parts.append(part[:2])
        for total, gradient in zip(sums, part[2], strict=True):
            total += gradient
    assert largest_error(out, torch.cat([alone for alone, _ in parts])) < TOLERANCE
    for index, gradient in enumerate(token_gradients):
        assert largest_error(gradient, torch.cat([alone[index] for _, alone in parts])) < TOLERANCE
    for gradient, total in zip(weight_gradients, sums, strict=True):
        assert largest_error(gradient, total) < TOLERANCE


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_leak_would_be_seen(name: str) -> None:
    """As one document the tokens after the cut, and the weights' gradients, come out differently by much."""
    tokens, weights = inputs_of(name, 60, 0)
    up = torch.randn(OPERATIONS[name][0](tokens, weights, documents(25, 35)).shape)
    apart, joined = run(name, tokens, weights, [25, 35], up), run(name, tokens, weights, [60], up)
    assert largest_error(joined[0][:25], apart[0][:25]) < TOLERANCE
    assert largest_error(joined[0][25:], apart[0][25:]) > 1e-2
    for gradient, expected in zip(joined[2], apart[2], strict=True):
        assert largest_error(gradient, expected) > 1e-2
