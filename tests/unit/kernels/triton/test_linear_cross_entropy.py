"""The CUDA head and cross entropy against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.triton import linear_cross_entropy
from qwen3next_train.kernels.triton.linear_cross_entropy import linear_cross_entropy_triton
from tests.unit.kernels.comparison import BOUNDS, errors
from tests.unit.kernels.interpreted import DEVICE


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def inputs(num_tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, head weight and labels, every fifth one ignored."""
    torch.manual_seed(0)
    x = torch.randn(num_tokens, hidden, device=DEVICE, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, device=DEVICE, dtype=dtype) * hidden**-0.5
    labels = torch.randint(vocabulary, (num_tokens,), device=DEVICE)
    labels[::5] = IGNORE_INDEX
    return x, weight, labels


def check(num_tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight, labels = inputs(num_tokens, vocabulary, hidden, dtype)
    found = errors(
        lambda x, w: linear_cross_entropy_triton(x, w, labels) / 64,
        lambda x, w: reference(x, w, labels) / 64,
        [x, weight],
    )
    assert max(found) < BOUNDS[dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_sum_and_gradients(dtype: torch.dtype, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", rows_per_chunk * 50)
    check(11, 50, 12, dtype)


def test_a_vocabulary_of_several_blocks_that_fills_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_LANES", 16)
    check(6, 1001, 8, torch.float32)


def test_large_logits() -> None:
    x, weight, labels = inputs(5, 70, 8, torch.float32)
    found = errors(
        lambda x, w: linear_cross_entropy_triton(x, w, labels),
        lambda x, w: reference(x, w, labels),
        [1000 * x, 10 * weight],
    )
    assert max(found) < 1e-5, found


def test_no_real_label_is_a_zero_loss_with_zero_gradients() -> None:
    x, weight, labels = inputs(6, 50, 8, torch.float32)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    value = linear_cross_entropy_triton(x, weight, torch.full_like(labels, IGNORE_INDEX))
    assert value.item() == 0
    value.backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


def test_no_tokens() -> None:
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(50, 8, device=DEVICE, requires_grad=True)
    value = linear_cross_entropy_triton(x, weight, torch.empty(0, dtype=torch.int64, device=DEVICE))
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_label_outside_of_the_vocabulary_is_not_a_number() -> None:
    x, weight, labels = inputs(6, 50, 8, torch.float32)
    for label in (50, -1):
        labels[1] = label
        assert linear_cross_entropy_triton(x, weight, labels).isnan()


def test_without_gradients_nothing_is_kept() -> None:
    x, weight, labels = inputs(6, 50, 8, torch.float32)
    expected = reference(x, weight, labels)
    with torch.no_grad():
        value = linear_cross_entropy_triton(x.requires_grad_(), weight, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_chunk", [400, 2000])
def test_at_the_model_s_vocabulary(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", rows_per_chunk * 151936)
    check(1001, 151936, 256, torch.bfloat16)
