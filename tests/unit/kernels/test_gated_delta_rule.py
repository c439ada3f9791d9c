"""The chunked gated delta rule against the recurrence in fp64: outputs, states and every gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from qwen3next_train.kernels.gated_delta_rule import (
    CHUNK_SIZE,
    delta_rule_step,
    gated_delta_rule_reference,
    recurrent_gated_delta_rule,
)
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import reference_kernels
from qwen3next_train.selftest.case import Case, RandomInputs, compare
from qwen3next_train.selftest.mixer_cases import gated_delta_rule
from tests.unit.kernels.comparison import largest_error
from tests.unit.kernels.packing import CPU, documents, spans

SHAPE = HeadShape(2, 4, 8, 12)


def make_case(
    lengths: tuple[int, ...], g: Callable[[torch.Size], torch.Tensor], seed: int = 0, *, shape: HeadShape = SHAPE
) -> Case:
    """With states at both ends of the documents, as large as the values."""
    draw = RandomInputs(torch.Generator().manual_seed(seed), CPU)
    case = gated_delta_rule(draw, shape, documents(*lengths), with_states=True)
    g_TN, state_DNKV = g(case.inputs["g_TN"].shape).double(), 10 * case.inputs["initial_state_DNKV"]
    return replace(case, inputs={**case.inputs, "g_TN": g_TN, "initial_state_DNKV": state_DNKV})


def check(case: Case, bound: float, dtype: torch.dtype = torch.float64) -> None:
    """Compare the chunked rule, in ``dtype``, with the recurrence in fp64: outputs, final states, all gradients."""
    inputs = {name: x.to(dtype) for name, x in case.inputs.items()}
    found = compare(partial(case.run, reference_kernels()), case.definition, inputs, measure=largest_error)
    assert len(found) == 8
    assert max(found.values()) < bound, found


def mild(shape: torch.Size) -> torch.Tensor:
    """Log decays of an ordinary layer."""
    return -torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lengths", [(1,), (63,), (64,), (65,), (CHUNK_SIZE,), (1, 63, 64, 65, 2, 200, 31), (1000,)])
def test_equals_the_recurrence_at_every_length_and_packing(lengths: tuple[int, ...]) -> None:
    check(make_case(lengths, mild), 1e-12)
    check(make_case(lengths, mild), 3e-6, torch.float32)


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
    check(make_case(lengths, GATES[gate]), 1e-11)
    check(make_case(lengths, GATES[gate]), 1e-5, torch.float32)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (3, 3), (2, 8)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 5), (16, 3), (1, 7)])
def test_any_heads_and_dimensions(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> None:
    shape = HeadShape(key_heads, value_heads, key_dim, value_dim)
    check(make_case((41, 1, 6), mild, shape=shape), 1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_recurrence_for_random_cuts_and_gates(seed: int) -> None:
    """Document lengths of 1 to 99 and gates of -20 to 0, drawn together."""
    rng = random.Random(seed)
    lengths = (1, *(rng.randint(1, 99) for _ in range(rng.randint(1, 5))))

    def gates(shape: torch.Size) -> torch.Tensor:
        return -20 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** rng.choice((1, 4, 16))

    check(make_case(lengths, gates, seed), 1e-11)


def test_gradients_equal_finite_differences() -> None:
    """Of all six inputs, so that no derivative rests on autograd alone."""
    case = make_case((2, CHUNK_SIZE + 1), mild, shape=HeadShape(1, 2, 2, 1))

    def rule(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.run(reference_kernels(), **dict(zip(case.inputs, inputs, strict=True)))

    assert torch.autograd.gradcheck(rule, [tensor.requires_grad_() for tensor in case.inputs.values()], fast_mode=True)


def test_full_write_strength_of_one_repeated_key_does_not_blow_up() -> None:
    case = make_case((96,), torch.zeros)
    k_THK, beta_TN = case.inputs["k_THK"], case.inputs["beta_TN"]
    changed = {"k_THK": k_THK[:1].expand_as(k_THK).clone(), "beta_TN": torch.ones_like(beta_TN)}
    check(replace(case, inputs={**case.inputs, **changed}), 1e-5, torch.float32)


def test_recurrence_equals_a_loop_over_scalars() -> None:
    case = make_case((5,), mild)
    q, k, v, g, beta, state = case.inputs.values()
    out, final = case.definition(**case.inputs)
    for head in range(SHAPE.value_heads):
        group = head // SHAPE.group
        s = state[0, head].clone()
        for t in range(5):
            qt, kt = q[t, group] / SHAPE.key_dim**0.5, k[t, group]
            s = g[t, head].exp() * s
            s = s + beta[t, head] * torch.outer(kt, v[t, head] - s.T @ kt)
            torch.testing.assert_close(out[t, head], s.T @ qt, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(final[0, head], s, rtol=1e-12, atol=1e-14)


def test_no_initial_state_is_a_zero_state() -> None:
    inputs = make_case((40, 3), mild).inputs
    zero = {"initial_state_DNKV": torch.zeros_like(inputs["initial_state_DNKV"])}
    rule = partial(gated_delta_rule_reference, sequences=documents(40, 3), output_final_state=True)
    without = {name: x for name, x in inputs.items() if name not in zero}
    for value, expected in zip(rule(**without), rule(**without, **zero), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_final_state_continues_a_document() -> None:
    case = make_case((100,), mild)
    whole, end = case.run(reference_kernels(), **case.inputs)
    state = case.inputs["initial_state_DNKV"]
    for part in (slice(0, 37), slice(37, 100)):
        inputs = {name: x[part] for name, x in case.inputs.items()} | {"initial_state_DNKV": state}
        sequences = documents(part.stop - part.start)
        out, state = gated_delta_rule_reference(**inputs, sequences=sequences, output_final_state=True)
        torch.testing.assert_close(out, whole[part], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(state, end, rtol=1e-11, atol=1e-13)


def test_packed_documents_equal_separate_ones_under_slow_decay() -> None:
    lengths = (50, 1, 97)
    case = make_case(lengths, lambda shape: torch.full(shape, -1e-3))
    packed, _ = case.run(reference_kernels(), **case.inputs)
    for index, span in enumerate(spans(lengths)):
        state = {"initial_state_DNKV": case.inputs["initial_state_DNKV"][index : index + 1]}
        inputs = {name: x[span] for name, x in case.inputs.items()} | state
        out, _ = gated_delta_rule_reference(**inputs, sequences=documents(lengths[index]))
        torch.testing.assert_close(out, packed[span], rtol=1e-12, atol=1e-13)


def test_bf16_input_is_computed_in_fp32() -> None:
    case = make_case((70,), mild)
    inputs = {name: x.bfloat16() for name, x in case.inputs.items()}
    out, final = case.run(reference_kernels(), **inputs)
    expected, expected_final = case.definition(**{name: x.double() for name, x in inputs.items()})
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert largest_error(final, expected_final) < 3e-6
    assert largest_error(out, expected) < 2**-8


def test_no_final_state_is_written_unasked() -> None:
    inputs = gated_delta_rule(RandomInputs(torch.Generator(), CPU), SHAPE, documents(40)).inputs
    for rule in (gated_delta_rule_reference, recurrent_gated_delta_rule):
        assert rule(**inputs, sequences=documents(40))[1] is None


def test_a_step_is_one_token_of_each_document() -> None:
    inputs = make_case((1, 1, 1), mild).inputs
    names = {"g_TN": "g_DN", "beta_TN": "beta_DN", "initial_state_DNKV": "state_DNKV"}
    operands = [inputs[name] for name in ("q_THK", "k_THK", "v_TNV")]
    rest = {new: inputs[old] for old, new in names.items()}
    for changes in ({}, {"state_DNKV": None}):
        given = rest | changes
        found = delta_rule_step(*operands, **given)
        expected = gated_delta_rule_reference(
            *operands,
            g_TN=given["g_DN"],
            beta_TN=given["beta_DN"],
            sequences=documents(1, 1, 1),
            initial_state_DNKV=given["state_DNKV"],
            output_final_state=True,
        )
        for value, wanted in zip(found, expected, strict=True):
            assert wanted is not None
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)
    rounded = delta_rule_step(*(x.bfloat16() for x in operands), **(rest | {"state_DNKV": None}))
    assert [x.dtype for x in rounded] == [torch.bfloat16, torch.float32]
