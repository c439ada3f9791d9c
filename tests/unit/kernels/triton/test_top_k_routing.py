"""Triton routing against plain torch in fp64: decisions, weights, statistics and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3next_train.kernels.routing import top_k_routing_reference
from qwen3next_train.kernels.selection import reference_kernels
from qwen3next_train.kernels.triton.top_k_routing import top_k_routing_triton
from qwen3next_train.selftest.moe_cases import top_k_routing
from tests.unit.kernels.comparison import errors, random, uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE

CASES = [
    # rows, tokens per row, hidden, experts, experts per token, renormalised
    (2, 13, 16, 6, 2, True),
    (1, 21, 8, 48, 10, True),
    (3, 5, 8, 5, 1, False),
    (1, 9, 8, 1100, 4, True),
    (1, 1, 8, 4, 4, True),
    (4, 1, 8, 16, 3, False),
]


def inputs_of(
    rows: int, tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights, without tokens for which fp32 may order the largest logits otherwise than fp64."""
    options = {"top_k": top_k, "renormalize": True, "num_rows": rows}
    case = top_k_routing(random(), 2 * rows * tokens + 10, hidden, experts, **options)
    x_TD, weight_ED = case.rounded(dtype).values()
    weight_ED = 4 * weight_ED
    largest = (x_TD.double() @ weight_ED.double().t()).topk(min(top_k + 1, experts)).values
    x_TD = x_TD[(largest.diff().abs() > 1e-4).all(1)][: rows * tokens]
    assert x_TD.shape[0] == rows * tokens
    return x_TD, weight_ED


def check(case: tuple[int, int, int, int, int, bool], dtype: torch.dtype, with_z_grad: bool) -> None:
    """Decisions equal; numbers within fp32's accuracy, but for the gradient of a bf16 x, which is rounded to it."""
    rows, tokens, hidden, experts, top_k, renormalize = case
    x, weight = inputs_of(rows, tokens, hidden, experts, top_k, dtype)
    options = {"top_k": top_k, "renormalize": renormalize, "num_rows": rows}
    with uninitialized_is_nan():
        found = top_k_routing_triton(x, weight, with_z_grad=with_z_grad, **options)
    reference = top_k_routing_reference(x.double(), weight.double(), with_z_grad=with_z_grad, **options)
    assert torch.equal(found.ids_TK, reference.ids_TK)
    assert torch.equal(found.counts_rE, reference.counts_rE)
    for name in ("z", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(reference, name), rtol=1e-5, atol=1e-6)
    routed = replace(
        top_k_routing(random(), 1, hidden, experts, with_z_grad=with_z_grad, **options),
        inputs={"x_TD": x, "weight_ED": weight},
    )
    # At the model's size plain torch in fp32 is off by about 1e-5 too.
    plain = errors(routed, torch.float32, reference_kernels())
    bounds = {name: max(1e-5, 2 * error) for name, error in plain.items()}
    if dtype == torch.bfloat16:
        bounds["grad x_TD"] = 2**-8
    found_errors = errors(routed, dtype)
    assert all(error < bounds[name] for name, error in found_errors.items()), (found_errors, bounds)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(case: tuple[int, int, int, int, int, bool], dtype: torch.dtype) -> None:
    check(case, dtype, with_z_grad=True)


def test_z_takes_no_gradient_unless_asked_to() -> None:
    check(CASES[0], torch.bfloat16, with_z_grad=False)
    x, weight = inputs_of(2, 13, 16, 6, 2, torch.bfloat16)
    options = {"top_k": 2, "renormalize": True, "num_rows": 2}
    routing = top_k_routing_triton(x, weight.requires_grad_(), with_z_grad=False, **options)
    assert routing.weights_TK.requires_grad
    assert not routing.z.requires_grad
    assert not routing.entropy.requires_grad


def test_weights_that_bf16_cannot_hold_reach_the_logits() -> None:
    """Two experts whose weights differ by 2^-20: equal in bf16 and in TF32, not in fp32."""
    x = torch.ones(1, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(2, 16, device=DEVICE)
    weight[1] += 2**-20
    routing = top_k_routing_triton(x, weight, top_k=2, renormalize=False, num_rows=1, with_z_grad=False)
    assert routing.ids_TK.tolist() == [[1, 0]]
    ratio = float(routing.weights_TK[0, 0].double() / routing.weights_TK[0, 1].double())
    assert ratio - 1 == pytest.approx(16 * 2**-20, rel=0.02)


def test_equal_experts_are_taken_from_the_left_and_none_twice() -> None:
    x, weight = torch.ones(3, 16, device=DEVICE), torch.zeros(7, 16, device=DEVICE)
    routing = top_k_routing_triton(x, weight, top_k=3, renormalize=True, num_rows=1, with_z_grad=False)
    assert routing.ids_TK.tolist() == [[0, 1, 2]] * 3
    assert routing.counts_rE.tolist() == [[3, 3, 3, 0, 0, 0, 0]]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_ids_stay_within_bounds_where_x_is_not_finite() -> None:
    """A broken step must show as a loss that is not finite, not as an illegal memory access."""
    x, weight = inputs_of(1, 4, 16, 5, 3, torch.float32)
    x[1, 0], x[2] = float("nan"), float("inf")
    routing = top_k_routing_triton(x, weight, top_k=3, renormalize=True, num_rows=1, with_z_grad=False)
    assert ((routing.ids_TK >= 0) & (routing.ids_TK < 5)).all()
    assert routing.counts_rE.sum() == routing.ids_TK.numel()
    assert routing.weights_TK[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1001, 4096])
def test_at_the_model_s_size(dtype: torch.dtype, tokens: int) -> None:
    check((2, tokens, 2048, 512, 10, True), dtype, with_z_grad=True)


@pytest.mark.gpu
def test_repeats_are_equal_bit_for_bit() -> None:
    x, weight = inputs_of(4, 4096, 2048, 512, 10, torch.bfloat16)
    options = {"top_k": 10, "renormalize": True, "num_rows": 4, "with_z_grad": True}
    results = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        routing = top_k_routing_triton(*leaves, **options)
        loss = routing.weights_TK[:, 0].sum() + routing.mean_prob_rE.square().sum() + routing.z
        results.append((*routing, *torch.autograd.grad(loss, leaves)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
