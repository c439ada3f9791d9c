"""The delta rule's inputs in plain torch, and its causal convolution by itself: loops, isolation of documents."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.kernels.gdn_prologue import HeadShape, causal_conv1d_reference, gdn_prologue_reference
from qwen3next_train.selftest.mixer_cases import gdn_prologue
from tests.unit.kernels.comparison import random
from tests.unit.kernels.packing import CPU, documents, spans


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
def test_convolution_equals_the_definition_with_gradients(lengths: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, width, dtype=torch.float64, requires_grad=True)
    out = causal_conv1d_reference(x, weight, sequences=documents(*lengths))
    expected = looped(x, weight, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(out)
    for value, reference in zip(
        torch.autograd.grad(out, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-14)


def test_convolution_of_a_document_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3), torch.randn(3, 4)
    changed = x.clone()
    changed[:4] += 1
    before = causal_conv1d_reference(x, weight, sequences=documents(4, 5))
    after = causal_conv1d_reference(changed, weight, sequences=documents(4, 5))
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


def test_prologue_is_its_definition_head_by_head() -> None:
    heads, sequences = HeadShape(2, 6, 3, 5), documents(4, 1, 3)
    inputs = gdn_prologue(random(CPU), heads, sequences, 4).inputs
    qkvz, ba, weight, A_log, dt_bias = inputs.values()
    out = gdn_prologue_reference(**inputs, heads=heads, sequences=sequences)
    starts = [0, 0, 0, 0, 4, 5, 5, 5]

    def convolved(t: int, column: int, channel: int) -> float:
        seen = range(max(starts[t], t - 3), t + 1)
        x = sum(float(weight[channel, 3 - (t - s)] * qkvz[s, column]) for s in seen)
        return x / (1 + math.exp(-x))

    for t in range(8):
        for head in range(2):
            first = head * 36
            q = torch.tensor([convolved(t, first + c, head * 3 + c) for c in range(3)])
            k = torch.tensor([convolved(t, first + 3 + c, 6 + head * 3 + c) for c in range(3)])
            for value, row in ((q, out.q_THK), (k, out.k_THK)):
                expected = value.double() / float((value.double().square().sum() + 1e-6).sqrt())
                torch.testing.assert_close(row[t, head], expected, rtol=1e-6, atol=1e-7)
            for r in range(3):
                n = head * 3 + r
                v = [convolved(t, first + 6 + r * 5 + c, 12 + n * 5 + c) for c in range(5)]
                torch.testing.assert_close(out.v_TNV[t, n], torch.tensor(v).double(), rtol=1e-6, atol=1e-7)
                assert torch.equal(out.z_THRV[t, head, r], qkvz[t, first + 21 + r * 5 : first + 26 + r * 5])
                a, b = float(ba[t, head * 6 + 3 + r]), float(ba[t, head * 6 + r])
                g = -math.exp(float(A_log[n])) * math.log1p(math.exp(a + float(dt_bias[n])))
                assert float(out.g_TN[t, n]) == pytest.approx(g, rel=1e-12)
                assert float(out.beta_TN[t, n]) == pytest.approx(1 / (1 + math.exp(-b)), rel=1e-12)
