"""What passes the delta rule's state along chunks, by Triton's interpreter; on a GPU test_cuda_backends has it.

FLA's kernels for what is within a chunk (sums of decays, w and u, the gradient of values) are by plain torch here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from qwen3next_train.kernels.gated_delta_rule import recurrent_gated_delta_rule, state_gradient_by, summary_by
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import RandomInputs, relative_error
from qwen3next_train.selftest.mixer_cases import delta_rule_summary, delta_state_gradient
from tests.unit.kernels.comparison import uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU the kernels run as they are")

HEADS = HeadShape(2, 6, 16, 40)
CHUNK = 64


def _chunks(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    for start, end in pairwise(cu_seqlens.tolist()):
        for first in range(start, end, CHUNK):
            yield slice(first, min(first + CHUNK, end))


def _cumsum(g: torch.Tensor, *, scale: float, cu_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
    return scale * torch.cat([g[:, chunk].cumsum(1) for chunk in _chunks(cu_seqlens)], dim=1)


def _decay(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the chunk's beginning, and between its tokens; sums are in powers of two."""
    G = math.log(2) * g
    return G.exp().unsqueeze(1), (G.unsqueeze(1) - G).exp().tril()


def _intra(
    *, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    group = v.shape[2] // k.shape[2]
    w, u = v.new_zeros(*v.shape[:3], k.shape[3]), torch.zeros_like(v)
    for chunk in _chunks(cu_seqlens):
        for n in range(v.shape[2]):
            keys, strength = k[0, chunk, n // group], beta[0, chunk, n].unsqueeze(1)
            from_start, between = _decay(g[0, chunk, n])
            inverse = (torch.eye(len(keys)) + (strength * keys @ keys.T * between).tril(-1)).inverse()
            w[0, chunk, n] = inverse @ (strength * from_start * keys)
            u[0, chunk, n] = inverse @ (strength * v[0, chunk, n])
    return w, u, None


def _dv_local(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    do: torch.Tensor,
    scale: float,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    group, dv = do.shape[2] // k.shape[2], torch.zeros_like(do)
    for chunk in _chunks(cu_seqlens):
        for n in range(do.shape[2]):
            scores = scale * q[0, chunk, n // group] @ k[0, chunk, n // group].T * _decay(g[0, chunk, n])[1]
            dv[0, chunk, n] = scores.T @ do[0, chunk, n]
    return dv


@pytest.fixture
def state_passing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    with warnings.catch_warnings():
        # FLA says that there is no GPU.
        warnings.simplefilter("ignore")
        from qwen3next_train.kernels.fla import state_passing as module

    monkeypatch.setattr(module, "chunk_local_cumsum", _cumsum)
    monkeypatch.setattr(module, "chunk_gated_delta_rule_fwd_intra", _intra)
    monkeypatch.setattr(module, "chunk_bwd_dv_local", _dv_local)
    return module


@pytest.mark.parametrize("lengths", [(1,), (64,), (65,), (5, 70, 1, 63), (130, 5)])
def test_summaries_and_state_gradients_are_the_recurrences(state_passing: ModuleType, lengths: tuple[int, ...]) -> None:
    """Odd lengths, several documents, empty segments, states and transitions apart; every element is written."""
    sequences = VarlenMetadata.from_lengths(lengths, DEVICE)
    case = delta_state_gradient(RandomInputs(torch.Generator().manual_seed(0), DEVICE), HEADS, sequences)
    inputs = case.rounded(torch.float32)
    queries, exact = inputs.pop("q_THK"), {name: value.double() for name, value in inputs.items()}
    with uninitialized_is_nan():
        gradient = state_passing.delta_state_gradient_fla(queries, **inputs, sequences=sequences)
    expected = state_gradient_by(recurrent_gated_delta_rule)(queries.double(), **exact, sequences=sequences)
    assert relative_error(gradient, expected) < 1e-6
    for each in (inputs, exact):
        each["v_TNV"] = each.pop("grad_TNV")
    with uninitialized_is_nan():
        summary = state_passing.delta_rule_summary_fla(**inputs, sequences=sequences)
    expected = summary_by(recurrent_gated_delta_rule)(**exact, sequences=sequences)
    sizes = HEADS.value_dim, HEADS.key_dim
    for found, right in zip(summary.split(sizes, dim=-1), expected.split(sizes, dim=-1), strict=True):
        assert relative_error(found, right) < 1e-6


def test_operands_that_are_views_are_those_of_their_copies(state_passing: ModuleType) -> None:
    """Heads before tokens in memory, and every other token of a longer row."""
    sequences = VarlenMetadata.from_lengths((70, 5), DEVICE)
    case = delta_state_gradient(RandomInputs(torch.Generator().manual_seed(0), DEVICE), HEADS, sequences)
    inputs = case.rounded(torch.float32)
    views = {name: value.transpose(0, 1).contiguous().transpose(0, 1) for name, value in inputs.items()}
    views["g_TN"] = inputs["g_TN"].repeat_interleave(2, dim=0)[::2]
    assert not any(view.is_contiguous() for view in views.values())
    expected = state_passing.delta_state_gradient_fla(**inputs, sequences=sequences)
    assert torch.equal(state_passing.delta_state_gradient_fla(**views, sequences=sequences), expected)
    for each in (inputs, views):
        del each["q_THK"]
        each["v_TNV"] = each.pop("grad_TNV")
    expected = state_passing.delta_rule_summary_fla(**inputs, sequences=sequences)
    assert torch.equal(state_passing.delta_rule_summary_fla(**views, sequences=sequences), expected)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((16384,), list(range(0, 16385, 2048))),
        ((1,), [0, 1]),
        # Six chunks of one document: six segments.
        ((321,), [0, 64, 128, 192, 256, 320, 321]),
        # Six chunks in four segments of two: the last is empty. Of the second document there is only one chunk.
        ((321, 60), [0, 128, 256, 321, 321, 381, 381, 381, 381]),
        ((70,) * 9, [70 * document for document in range(10)]),
    ],
)
def test_segments_begin_at_chunks(state_passing: ModuleType, lengths: tuple[int, ...], expected: list[int]) -> None:
    """Eight in all if there are so many chunks, of each document as many."""
    sequences = VarlenMetadata.from_lengths(lengths, DEVICE)
    found = state_passing._segments(sequences, state_passing._num_segments(sequences, 128))
    assert (found.tolist(), found.dtype) == (expected, torch.int32)


def test_large_heads_are_not_cut_into_segments(state_passing: ModuleType) -> None:
    """Two transitions of 256 keys are not joined: one fills more than a multiprocessor's shared memory."""
    sequences = VarlenMetadata.from_lengths((16384, 16384), DEVICE)
    assert [state_passing._num_segments(sequences, key_dim) for key_dim in (128, 129, 256)] == [4, 1, 1]
    short = VarlenMetadata.from_lengths((130,), DEVICE)
    # What is derived of the documents for one size of heads is not taken for the other.
    for heads in (HeadShape(1, 1, 16, 8), HeadShape(1, 1, 130, 8)):
        case = delta_rule_summary(RandomInputs(torch.Generator().manual_seed(0), DEVICE), heads, short)
        inputs = case.rounded(torch.float32)
        found = state_passing.delta_rule_summary_fla(**inputs, sequences=short)
        exact = {name: value.double() for name, value in inputs.items()}
        assert relative_error(found, summary_by(recurrent_gated_delta_rule)(**exact, sequences=short)) < 1e-6


def test_segments_are_joined_as_they_follow_each_other(state_passing: ModuleType) -> None:
    """Two documents of eight segments, against one segment after the other in fp64."""
    parts = torch.randn(2, 8, 3, 4, 5 + 4, generator=torch.Generator().manual_seed(0))
    states, transitions = parts[:, 0].double().split((5, 4), dim=-1)
    for segment in range(1, 8):
        own, through = parts[:, segment].double().split((5, 4), dim=-1)
        states, transitions = through @ states + own, through @ transitions
    with uninitialized_is_nan():
        found = state_passing.joined(parts.to(DEVICE), value_dim=5)
    assert relative_error(found, torch.cat((states, transitions), dim=-1)) < 1e-6
