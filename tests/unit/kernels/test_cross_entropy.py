"""Chunked head and cross entropy against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen3next_train.kernels import cross_entropy
from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_chunked
from qwen3next_train.kernels.selection import reference_kernels
from qwen3next_train.selftest.case import case_errors
from qwen3next_train.selftest.dense_cases import linear_cross_entropy
from tests.unit.kernels.comparison import largest_error, random
from tests.unit.kernels.packing import CPU

VOCAB, HIDDEN = 50, 12


def leaves(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight and labels, every fifth one ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (num_tokens,))
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
def test_sum_and_gradients_equal_torch(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_LOGITS, "cpu", rows_per_chunk * VOCAB)
    case = linear_cross_entropy(random(CPU), 23, VOCAB, HIDDEN)
    found = case_errors(case, reference_kernels(), torch.float64)
    assert max(found.values()) < 1e-12, found


def test_two_heads_sharing_a_weight_add_their_gradients() -> None:
    hidden, weight, labels = leaves(20, torch.float64)
    further = labels.roll(-1)
    total = linear_cross_entropy_chunked(hidden, weight, labels) / 16
    total = total + 0.1 * linear_cross_entropy_chunked(hidden.tanh(), weight, further) / 15
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum") / 16
    expected = expected + 0.1 * F.cross_entropy(hidden.tanh() @ weight.T, further, reduction="sum") / 15
    for got, reference in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows_per_chunk", [7, 1000])
def test_losses_of_positions_leave_the_sum_as_it_is(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_LOGITS, "cpu", rows_per_chunk * VOCAB)
    results = []
    for losses in (None, torch.full((23,), torch.nan)):
        hidden, weight, labels = leaves(23, torch.float32)
        value = linear_cross_entropy_chunked(hidden, weight, labels, losses)
        results.append((value, *torch.autograd.grad(value, (hidden, weight))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[labels == IGNORE_INDEX].tolist() == [0.0] * 5


def test_no_real_label_is_a_zero_loss_with_zero_gradients() -> None:
    hidden, weight, labels = leaves(6, torch.float32)
    value = linear_cross_entropy_chunked(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    assert value.item() == 0
    value.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = leaves(10, torch.float32)
    value = linear_cross_entropy_chunked(hidden * 1e4, weight, labels)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(hidden.grad).all()


def test_without_grad_mode_nothing_is_kept() -> None:
    hidden, weight, labels = leaves(10, torch.float32)
    with torch.no_grad():
        value = linear_cross_entropy_chunked(hidden, weight, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"))


def test_bf16_scale_of_the_gradient_is_not_rounded() -> None:
    hidden, weight, labels = (t.detach() for t in leaves(2000, torch.float32))
    half = [hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    scale = 1 / 1599  # 0.2 % off as bf16
    (linear_cross_entropy_chunked(half[0], half[1], labels) * scale).backward()
    wide = [t.detach().double().requires_grad_() for t in half]
    (F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum") * scale).backward()
    (value_hidden, value_weight), (hidden_grad, weight_grad) = ([t.grad for t in pair] for pair in (half, wide))
    ratio = float((value_weight.double() * weight_grad).sum() / weight_grad.square().sum())
    assert abs(ratio - 1) < 3e-4
    assert largest_error(value_hidden, hidden_grad) < 2e-2
