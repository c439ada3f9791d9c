"""The CUDA head and cross entropy against torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3next_train.accounting import activations
from qwen3next_train.kernels.cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.triton import linear_cross_entropy
from qwen3next_train.kernels.triton.linear_cross_entropy import linear_cross_entropy_triton
from qwen3next_train.selftest.dense_cases import linear_cross_entropy as case_of
from tests.unit.kernels.comparison import check, errors, random, triton_kernels
from tests.unit.kernels.interpreted import DEVICE


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six hidden states, the head's weight for a vocabulary of 50, and labels."""
    hidden, weight = case_of(random(), 6, 50, 8).rounded(torch.float32).values()
    return hidden.requires_grad_(), weight.requires_grad_(), torch.arange(6, device=DEVICE)


def test_accounting_counts_the_chunk_that_is_used() -> None:
    assert activations._CHUNK_LOGITS == linear_cross_entropy._CHUNK_LOGITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
def test_sum_and_gradients(dtype: torch.dtype, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", rows_per_chunk * 50)
    check(case_of(random(), 11, 50, 12), dtype)


def test_losses_of_positions_leave_the_sum_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", 4 * 50)
    x, weight, labels = inputs()
    labels[1] = -100
    losses = torch.full((6,), torch.nan, device=DEVICE)
    results = []
    for out in (None, losses):
        value = linear_cross_entropy_triton(x, weight, labels, out)
        results.append((value, *torch.autograd.grad(value, (x, weight))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(x @ weight.T, labels, reduction="none"))
    assert losses[1] == 0


def test_a_vocabulary_of_several_blocks_that_fills_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_LANES", 16)
    check(case_of(random(), 6, 1001, 8), torch.float32)


def test_large_logits() -> None:
    case = case_of(random(), 5, 70, 8)
    scales = {"hidden_TD": 1000, "weight_VD": 10}
    large = replace(case, inputs={name: scales[name] * value for name, value in case.inputs.items()})
    found = errors(large, torch.float32)
    assert max(found.values()) < 1e-5, found


def test_no_real_label_is_a_zero_loss_with_zero_gradients() -> None:
    x, weight, labels = inputs()
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
    x, weight, labels = inputs()
    for label in (50, -1):
        labels[1] = label
        assert linear_cross_entropy_triton(x, weight, labels).isnan()


def test_without_gradients_nothing_is_kept() -> None:
    case = case_of(random(), 6, 50, 8)
    leaves = {name: x.requires_grad_() for name, x in case.rounded(torch.float32).items()}
    with torch.no_grad():
        (value,) = case.run(triton_kernels(), **leaves)
    assert not value.requires_grad
    torch.testing.assert_close(value, case.definition(**leaves)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_chunk", [400, 2000])
def test_at_the_model_s_vocabulary(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", rows_per_chunk * 151936)
    check(case_of(random(), 1001, 151936, 256), torch.bfloat16)
