"""Triton token permutation against plain torch, with pairs that have no expert here."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.routing import TokenPermutation
from qwen3next_train.kernels.triton.token_permutation import TokenPermutationTriton
from qwen3next_train.selftest.moe_cases import permute, random_experts, unpermute
from tests.unit.kernels.comparison import check, random, uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE

REFERENCE = TokenPermutation()
TRITON = TokenPermutationTriton()


def random_ids(tokens: int, top_k: int, experts: int, *, absent: float = 0.0) -> torch.Tensor:
    """Different experts for each token, a share of them absent."""
    draw = random()
    ids = random_experts(draw, tokens, experts, top_k)
    return ids.masked_fill(draw.uniform(tokens, top_k) < absent, -1)


def check_triton(ids: torch.Tensor, experts: int, hidden: int, dtype: torch.dtype) -> None:
    routed = int((ids >= 0).sum())
    reference = REFERENCE.sort(ids, experts, routed)
    with uninitialized_is_nan():
        order = TRITON.sort(ids, experts, routed)
    for field in ("token_R", "row_TK", "counts_E"):
        assert torch.equal(getattr(order, field), getattr(reference, field)), field
    found = check(permute(random(), ids, experts, hidden), dtype)
    assert (found["output 2"], found["grad weights_TK"]) == (0.0, 0.0)
    check(unpermute(random(), ids, experts, hidden), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "absent"),
    [(20, 3, 5, 0.0), (34, 4, 70, 0.3), (3, 1, 1, 0.0), (1, 10, 300, 0.5), (2, 2, 4, 0.0)],
)
def test_triton_equals_the_reference(dtype: torch.dtype, tokens: int, top_k: int, experts: int, absent: float) -> None:
    """Up to two blocks of 128 pairs and of 64 experts."""
    check_triton(random_ids(tokens, top_k, experts, absent=absent), experts, 24, dtype)


def test_triton_with_more_blocks_of_pairs_than_are_scanned_at_once() -> None:
    ids = torch.randint(0, 3, (5700, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    order, reference = TRITON.sort(ids, 3, ids.numel()), REFERENCE.sort(ids, 3, ids.numel())
    assert torch.equal(order.row_TK, reference.row_TK)
    assert torch.equal(order.token_R, reference.token_R)


@pytest.mark.parametrize("num_rows", [0, 1, 50, 300])
def test_triton_with_room_for_fewer_or_more_rows_than_pairs(num_rows: int) -> None:
    """Nothing is written outside of the room, and what stands behind the last row is not read."""
    ids = random_ids(34, 4, 7, absent=0.3)
    routed, draw = int((ids >= 0).sum()), random()
    x, weights = draw.normal(34, 24).requires_grad_(), draw.uniform(34, 4).requires_grad_()
    upstream_TD, upstream_R = draw.normal(34, 24), draw.uniform(num_rows)
    upstream_R[routed:] = torch.nan
    results = []
    for permutation in (REFERENCE, TRITON):
        with uninitialized_is_nan():
            order = permutation.sort(ids, 7, num_rows)
            moved_R = permutation.permute_weights(weights, order)
            rows_RD = permutation.permute(x, order)
        with torch.no_grad():
            rows_RD[routed:] = torch.nan
        sums_TD = permutation.unpermute(rows_RD, order)
        grads = torch.autograd.grad((sums_TD, moved_R), (x, weights), (upstream_TD, upstream_R))
        filled = min(routed, num_rows)
        results.append((order.token_R[:filled], order.row_TK, order.counts_E, moved_R[:filled], sums_TD, *grads))
    for expected, found in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected)


def test_triton_without_any_row() -> None:
    ids = torch.full((3, 2), -1, device=DEVICE)
    order = TRITON.sort(ids, 5, 0)
    assert order.row_TK.tolist() == ids.tolist()
    assert order.counts_E.tolist() == [0] * 5
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    weights = torch.rand(3, 2, device=DEVICE, requires_grad=True)
    rows = TRITON.permute(x, order)
    assert rows.shape == (0, 8)
    sums = TRITON.unpermute(rows, order)
    (sums.sum() + TRITON.permute_weights(weights, order).sum()).backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert not sums.any()
    assert not x.grad.any()
    assert not weights.grad.any()


def test_triton_does_not_read_what_lies_outside_of_views() -> None:
    """Columns of wider tensors, and a gradient that is one number for all of them."""
    ids, draw = random_ids(9, 2, 4), random()
    views = {"x_TD": draw.normal(9, 40)[:, 3:19], "weights_TK": draw.uniform(9, 4)[:, 1:3]}
    check(permute(draw, ids, 4, 16), torch.float32, **views)
    check(unpermute(draw, ids, 4, 16), torch.float32, rows_RD=draw.normal(18, 40)[:, 3:19])
    order = TRITON.sort(ids, 4, 18)
    x = torch.randn(9, 16, device=DEVICE, requires_grad=True)
    TRITON.permute(x, order).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "absent"), [(512, 0.0), (64, 0.4)])
def test_triton_at_the_model_s_size(experts: int, absent: float) -> None:
    check_triton(random_ids(1001, 10, experts, absent=absent), experts, 2048, torch.bfloat16)


@pytest.mark.gpu
def test_triton_with_more_than_two_to_the_31_elements() -> None:
    ids = random_ids(110_000, 10, 64)
    order = TRITON.sort(ids, 64, ids.numel())
    x = torch.randn(len(ids), 2048, device=DEVICE, dtype=torch.bfloat16)
    rows = TRITON.permute(x, order)
    for first in range(0, len(rows), 200_000):
        assert torch.equal(rows[first : first + 200_000], x[order.token_R[first : first + 200_000]])
    sums = TRITON.unpermute(rows, order)
    assert torch.equal(sums, (x.float() * 10).bfloat16())
