"""The causal convolution against a loop over tokens, and its isolation of documents."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gdn_prologue.reference import causal_conv1d_reference
from tests.unit.kernels.packing import documents, spans


def looped(x_TC: torch.Tensor, weight_CW: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The definition, one output at a time."""
    width = weight_CW.shape[1]
    rows = []
    for span in spans(lengths):
        for t in range(span.start, span.stop):
            total = torch.zeros_like(x_TC[0])
            for back in range(min(width, t - span.start + 1)):
                total = total + weight_CW[:, width - 1 - back] * x_TC[t - back]
            rows.append(total * torch.sigmoid(total))
    return torch.stack(rows)


@pytest.mark.parametrize("width", [2, 3, 4, 7])
@pytest.mark.parametrize("lengths", [(1,), (2, 1, 1, 3), (5, 20, 2)])
def test_equals_the_definition_with_gradients(lengths: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, width, dtype=torch.float64, requires_grad=True)
    out = causal_conv1d_reference(x, weight, sequences=documents(*lengths))
    expected = looped(x, weight, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(out)
    for value, truth in zip(
        torch.autograd.grad(out, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3), torch.randn(3, 4)
    changed = x.clone()
    changed[:4] += 1
    before = causal_conv1d_reference(x, weight, sequences=documents(4, 5))
    after = causal_conv1d_reference(changed, weight, sequences=documents(4, 5))
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])
