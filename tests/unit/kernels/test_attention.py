"""Packed attention against softmax written out per document."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from qwen3next_train.kernels.attention import varlen_attention_reference
from qwen3next_train.kernels.selection import reference_kernels
from qwen3next_train.selftest.case import compare
from qwen3next_train.selftest.mixer_cases import varlen_attention
from tests.unit.kernels.comparison import largest_error, random
from tests.unit.kernels.packing import CPU, documents

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 5), (1, 9, 2, 3, 1), (16, 1)])
def test_equals_softmax_written_out_with_gradients(lengths: tuple[int, ...]) -> None:
    case = varlen_attention(random(CPU), HEADS, KV_HEADS, HEAD_DIM, documents(*lengths))
    kernel = partial(case.run, reference_kernels())
    found = compare(kernel, case.definition, case.inputs, measure=largest_error)
    assert max(found.values()) < 1e-12, found


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(9, HEADS, HEAD_DIM), torch.randn(9, KV_HEADS, HEAD_DIM), torch.randn(9, KV_HEADS, HEAD_DIM)
    before = varlen_attention_reference(q, k, v, sequences=documents(3, 6))
    k[:3] += 1
    v[:3] += 1
    after = varlen_attention_reference(q, k, v, sequences=documents(3, 6))
    assert torch.equal(before[3:], after[3:])
