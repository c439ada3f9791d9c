"""The chunked gated delta rule against the recurrence in fp64: outputs, states and every gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import normalize

from qwen3next_train.kernels.gated_delta_rule import CHUNK_SIZE, gated_delta_rule_reference, recurrent_gated_delta_rule
from tests.unit.kernels.packing import documents, relative_error, spans


class Shape(NamedTuple):
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


SHAPE = Shape(2, 4, 8, 12)
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = SHAPE
NAMES = ("output", "final state", "q", "k", "v", "g", "beta", "initial state")
Inputs = list[torch.Tensor]


def make_inputs(
    num_tokens: int,
    num_documents: int,
    g: Callable[[torch.Size], torch.Tensor],
    seed: int = 0,
    *,
    shape: Shape = SHAPE,
) -> Inputs:
    """Unit q and k, v, g, beta, initial state in fp64."""
    generator = torch.Generator().manual_seed(seed)
    key_heads, value_heads, key_dim, value_dim = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    beta = torch.rand(num_tokens, value_heads, dtype=torch.float64, generator=generator)
    return [
        normalize(normal(num_tokens, key_heads, key_dim), dim=-1),
        normalize(normal(num_tokens, key_heads, key_dim), dim=-1),
        normal(num_tokens, value_heads, value_dim),
        g(beta.shape).double(),
        beta,
        normal(num_documents, value_heads, key_dim, value_dim),
    ]


def run(rule: Callable[..., tuple], inputs: Inputs, lengths: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Output, final state, and the gradients of a random functional of both."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    q, k, v, g, beta, state = leaves
    out, final = rule(
        *(q, k, v),
        g_TN=g,
        beta_TN=beta,
        sequences=documents(*lengths),
        initial_state_DNKV=state,
        output_final_state=True,
    )
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in (out, final)]
    ((out * weights[0]).sum() + (final * weights[1]).sum()).backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), final.detach(), *gradients]


def mild(shape: torch.Size) -> torch.Tensor:
    """Log decays of an ordinary layer."""
    return -torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lengths", [(1,), (63,), (64,), (65,), (CHUNK_SIZE,), (1, 63, 64, 65, 2, 200, 31), (1000,)])
def test_equals_the_recurrence_at_every_length_and_packing(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), mild)
    expected = run(recurrent_gated_delta_rule, inputs, lengths, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        for name, value, reference in zip(
            NAMES, run(gated_delta_rule_reference, inputs, lengths, dtype), expected, strict=True
        ):
            assert relative_error(value, reference) < tolerance, (name, dtype)


GATES = {
    "no decay": lambda shape: torch.zeros(shape),
    "near 0": lambda shape: -1e-5 * torch.rand(shape, generator=torch.Generator().manual_seed(1)),
    "near -20": lambda shape: -20 + torch.rand(shape, generator=torch.Generator().manual_seed(1)),
    "forgetting between long memories": lambda shape: torch.where(
        torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.2, -20.0, -1e-3
    ),
}


@pytest.mark.parametrize("lengths", [(33,), (130, 7), (1, 31, 65, 2)])
@pytest.mark.parametrize("gate", list(GATES))
def test_stays_accurate_at_extreme_gates(gate: str, lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), GATES[gate])
    expected = run(recurrent_gated_delta_rule, inputs, lengths, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        values = run(gated_delta_rule_reference, inputs, lengths, dtype)
        for name, value, reference in zip(NAMES, values, expected, strict=True):
            assert torch.isfinite(value).all(), (name, dtype)
            assert relative_error(value, reference) < tolerance, (name, dtype)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (3, 3), (2, 8)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 5), (16, 3), (1, 7)])
def test_any_heads_and_dimensions(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> None:
    lengths = (41, 1, 6)
    shape = Shape(key_heads, value_heads, key_dim, value_dim)
    inputs = make_inputs(sum(lengths), len(lengths), mild, shape=shape)
    expected = run(recurrent_gated_delta_rule, inputs, lengths, torch.float64)
    values = run(gated_delta_rule_reference, inputs, lengths, torch.float64)
    for name, value, reference in zip(NAMES, values, expected, strict=True):
        assert relative_error(value, reference) < 1e-11, name


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_recurrence_for_random_cuts_and_gates(seed: int) -> None:
    """Document lengths of 1 to 99 and gates of -20 to 0, drawn together."""
    rng = random.Random(seed)
    lengths = (1, *(rng.randint(1, 99) for _ in range(rng.randint(1, 5))))

    def gates(shape: torch.Size) -> torch.Tensor:
        return -20 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** rng.choice((1, 4, 16))

    inputs = make_inputs(sum(lengths), len(lengths), gates, seed)
    expected = run(recurrent_gated_delta_rule, inputs, lengths, torch.float64)
    values = run(gated_delta_rule_reference, inputs, lengths, torch.float64)
    for name, value, reference in zip(NAMES, values, expected, strict=True):
        assert relative_error(value, reference) < 1e-11, name


def test_gradients_equal_finite_differences() -> None:
    """Of all six inputs, so that no derivative rests on autograd alone."""
    lengths = (2, CHUNK_SIZE + 1)
    inputs = make_inputs(sum(lengths), 2, mild, shape=Shape(1, 2, 2, 1))

    def rule(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta, state = tensors
        return gated_delta_rule_reference(
            *(q, k, v),
            g_TN=g,
            beta_TN=beta,
            sequences=documents(*lengths),
            initial_state_DNKV=state,
            output_final_state=True,
        )

    assert torch.autograd.gradcheck(rule, [tensor.requires_grad_() for tensor in inputs], fast_mode=True)


def test_full_write_strength_of_one_repeated_key_does_not_blow_up() -> None:
    q, k, v, g, beta, state = make_inputs(96, 1, lambda shape: torch.zeros(shape))
    inputs = [q, k[:1].expand_as(k).clone(), v, g, torch.ones_like(beta), state]
    expected = run(recurrent_gated_delta_rule, inputs, (96,), torch.float64)
    values = run(gated_delta_rule_reference, inputs, (96,), torch.float32)
    for name, value, reference in zip(NAMES, values, expected, strict=True):
        assert relative_error(value, reference) < 1e-5, name


def test_recurrence_equals_a_loop_over_scalars() -> None:
    q, k, v, g, beta, state = make_inputs(5, 1, mild)
    out, final = recurrent_gated_delta_rule(
        q, k, v, g_TN=g, beta_TN=beta, sequences=documents(5), initial_state_DNKV=state, output_final_state=True
    )
    for head in range(VALUE_HEADS):
        group = head // (VALUE_HEADS // KEY_HEADS)
        s = state[0, head].clone()
        for t in range(5):
            qt, kt = q[t, group] / KEY_DIM**0.5, k[t, group]
            s = g[t, head].exp() * s
            s = s + beta[t, head] * torch.outer(kt, v[t, head] - s.T @ kt)
            torch.testing.assert_close(out[t, head], s.T @ qt, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(final[0, head], s, rtol=1e-12, atol=1e-14)


def test_no_initial_state_is_a_zero_state() -> None:
    lengths = (40, 3)
    q, k, v, g, beta, state = make_inputs(43, 2, mild)
    rule = partial(
        gated_delta_rule_reference,
        *(q, k, v),
        g_TN=g,
        beta_TN=beta,
        sequences=documents(*lengths),
        output_final_state=True,
    )
    without = rule()
    zero = rule(initial_state_DNKV=torch.zeros_like(state))
    for value, expected in zip(without, zero, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_final_state_continues_a_document() -> None:
    q, k, v, g, beta, state = make_inputs(100, 1, mild)
    whole, end = gated_delta_rule_reference(
        q, k, v, g_TN=g, beta_TN=beta, sequences=documents(100), initial_state_DNKV=state, output_final_state=True
    )
    for part in (slice(0, 37), slice(37, 100)):
        out, state = gated_delta_rule_reference(
            q[part],
            k[part],
            v[part],
            g_TN=g[part],
            beta_TN=beta[part],
            sequences=documents(part.stop - part.start),
            initial_state_DNKV=state,
            output_final_state=True,
        )
        torch.testing.assert_close(out, whole[part], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(state, end, rtol=1e-11, atol=1e-13)


def test_packed_documents_equal_separate_ones_under_slow_decay() -> None:
    lengths = (50, 1, 97)
    inputs = make_inputs(sum(lengths), len(lengths), lambda shape: torch.full(shape, -1e-3))
    packed = run(gated_delta_rule_reference, inputs, lengths, torch.float64)
    q, k, v, g, beta, state = inputs
    for index, span in enumerate(spans(lengths)):
        out, _ = gated_delta_rule_reference(
            q[span],
            k[span],
            v[span],
            g_TN=g[span],
            beta_TN=beta[span],
            sequences=documents(lengths[index]),
            initial_state_DNKV=state[index : index + 1],
        )
        torch.testing.assert_close(out, packed[0][span], rtol=1e-12, atol=1e-13)


def test_bf16_input_is_computed_in_fp32() -> None:
    lengths = (70,)
    inputs = [tensor.bfloat16() for tensor in make_inputs(70, 1, mild)]
    q, k, v, g, beta, state = inputs
    out, final = gated_delta_rule_reference(
        *(q, k, v),
        g_TN=g,
        beta_TN=beta,
        sequences=documents(*lengths),
        initial_state_DNKV=state,
        output_final_state=True,
    )
    expected, expected_final = recurrent_gated_delta_rule(
        *(t.double() for t in (q, k, v)),
        g_TN=g.double(),
        beta_TN=beta.double(),
        sequences=documents(*lengths),
        initial_state_DNKV=state.double(),
        output_final_state=True,
    )
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(final, expected_final) < 3e-6
    assert relative_error(out, expected) < 2**-8


def test_no_final_state_is_written_unasked() -> None:
    q, k, v, g, beta, _ = make_inputs(40, 1, mild)
    for rule in (gated_delta_rule_reference, recurrent_gated_delta_rule):
        assert rule(q, k, v, g_TN=g, beta_TN=beta, sequences=documents(40))[1] is None
