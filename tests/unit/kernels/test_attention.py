"""Packed attention against softmax written out per document."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.attention import varlen_attention_reference
from tests.unit.kernels.packing import documents, spans

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Per document and head: softmax of the causal scores times the values."""
    rows = []
    for span in spans(lengths):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = q[span, head] @ k[span, group].T * HEAD_DIM**-0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[span, group])
        rows.append(torch.stack(heads, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 5), (1, 9, 2, 3, 1), (16, 1)])
def test_equals_softmax_written_out_with_gradients(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    leaves = [
        torch.randn(tokens, heads, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    out = varlen_attention_reference(*leaves, sequences=documents(*lengths))
    expected = written_out(*leaves, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    for value, reference in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-11)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(9, HEADS, HEAD_DIM), torch.randn(9, KV_HEADS, HEAD_DIM), torch.randn(9, KV_HEADS, HEAD_DIM)
    before = varlen_attention_reference(q, k, v, sequences=documents(3, 6))
    k[:3] += 1
    v[:3] += 1
    after = varlen_attention_reference(q, k, v, sequences=documents(3, 6))
    assert torch.equal(before[3:], after[3:])
