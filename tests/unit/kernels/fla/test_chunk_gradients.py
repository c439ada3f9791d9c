"""Gradients inside the chunks of the gated delta rule (Triton) against autograd through its chunked form in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.mixer_cases import gated_delta_rule
from tests.unit.kernels.comparison import largest_error, random, uninitialized_is_nan
from tests.unit.kernels.interpreted import DEVICE

NAMES = ("q", "k", "v", "g", "beta")


@dataclass
class Forward:
    """What the forward pass of the chunked rule goes through; all in fp64 and part of one autograd graph."""

    G_TN: torch.Tensor
    A_TNC: torch.Tensor
    v_new: list[list[torch.Tensor]]
    before: list[list[torch.Tensor]]
    after: list[list[torch.Tensor]]
    out_TNV: torch.Tensor


def forward(leaves: Sequence[torch.Tensor], lengths: Sequence[int], chunk_size: int) -> Forward:
    """By the formulas of the module's docstring."""
    q_THK, k_THK, v_TNV, g_TN, beta_TN = leaves
    heads, group = v_TNV.shape[1], v_TNV.shape[1] // k_THK.shape[1]
    scale = k_THK.shape[2] ** -0.5
    outs, inverses, decays = [], [], []
    found = Forward(g_TN, g_TN, [], [], [], g_TN)
    states: list[torch.Tensor] = []
    for start, stop, begins in chunk_spans(lengths, chunk_size):
        size = stop - start
        if begins:
            states = [v_TNV.new_zeros(k_THK.shape[2], v_TNV.shape[2], requires_grad=True) for _ in range(heads)]
        rows: list[list[torch.Tensor]] = [[] for _ in range(6)]
        for n in range(heads):
            q, k = (x_THK[start:stop, n // group] for x_THK in (q_THK, k_THK))
            v, beta = v_TNV[start:stop, n], beta_TN[start:stop, n].unsqueeze(1)
            G = g_TN[start:stop, n].cumsum(0)
            D = (G.unsqueeze(1) - G).exp().tril()
            A = (torch.eye(size, dtype=v.dtype, device=v.device) + (beta * k @ k.T * D).tril(-1)).inverse()
            h = states[n]
            w, u = A @ (beta * G.exp().unsqueeze(1) * k), A @ (beta * v)
            v_new = u - w @ h
            out = scale * (G.exp().unsqueeze(1) * q @ h + (q @ k.T * D) @ v_new)
            after = G[-1].exp() * h + ((G[-1] - G).exp().unsqueeze(1) * k).T @ v_new
            v_new.retain_grad()
            after.retain_grad()
            for row, value in zip(rows, (out, A, G, v_new, h, after), strict=True):
                row.append(value)
        outs.append(torch.stack(rows[0], 1))
        inverses.append(torch.nn.functional.pad(torch.stack(rows[1], 1), (0, chunk_size - size)))
        decays.append(torch.stack(rows[2], 1))
        found.v_new.append(rows[3])
        found.before.append(rows[4])
        found.after.append(rows[5])
        states = rows[5]
    found.out_TNV, found.A_TNC, found.G_TN = torch.cat(outs), torch.cat(inverses), torch.cat(decays)
    return found


def chunk_spans(lengths: Sequence[int], size: int) -> list[tuple[int, int, bool]]:
    spans, start = [], 0
    for length in lengths:
        for first in range(0, length, size):
            spans.append((start + first, start + min(first + size, length), first == 0))
        start += length
    return spans


def gradient_or_zero(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def check(
    lengths: Sequence[int],
    shape: tuple[int, int, int, int],
    *,
    chunk_size: int,
    dtype: torch.dtype,
    bounds: dict[str, float],
) -> None:
    """Compare for ``shape``: key heads, value heads to each, key and value head dim."""
    # Not at the top: Triton is imported where its kernels are used.
    from qwen3next_train.kernels.fla.chunk_gradients import ChunkInputs, ChunkStates, output_gradients, write_gradients

    key_heads, group, key_dim, value_dim = shape
    heads, sequences = key_heads * group, VarlenMetadata.from_lengths(lengths, DEVICE)
    draw = random()
    case = gated_delta_rule(draw, HeadShape(key_heads, heads, key_dim, value_dim), sequences)
    # From fast to slow: what a state has forgotten hides an error in it. No slower, for bf16's sake.
    g_TN = case.inputs["g_TN"] * torch.logspace(0, 1, heads, device=DEVICE)
    rounded = replace(case, inputs={**case.inputs, "g_TN": g_TN}).rounded(dtype)
    leaves = [x.double().requires_grad_() for x in rounded.values()]
    reference = forward(leaves, lengths, chunk_size)
    do_TNV = draw.normal(*reference.out_TNV.shape).to(dtype)
    reference.out_TNV.backward(do_TNV.double())

    def by_token(chunks: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.cat([torch.stack(heads, 1) for heads in chunks]).to(dtype)

    def by_chunk(chunks: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([torch.stack(heads) for heads in chunks]).to(dtype)

    narrow = [leaf.detach().to(dtype) for leaf in leaves]
    inputs = ChunkInputs(
        *narrow[:3],
        (reference.G_TN.detach() / math.log(2)).float(),
        narrow[4],
        reference.A_TNC.detach().to(dtype),
        do_TNV,
        sequences.cu_seqlens,
        sequences.chunk_indices(chunk_size),
    )
    states = ChunkStates(
        by_token([[v.detach() for v in chunk] for chunk in reference.v_new]),
        by_chunk([[h.detach() for h in chunk] for chunk in reference.before]),
        by_token([[gradient_or_zero(v) for v in chunk] for chunk in reference.v_new]),
        by_chunk([[gradient_or_zero(h) for h in chunk] for chunk in reference.after]),
    )
    with uninitialized_is_nan():
        outputs = output_gradients(inputs, states)
        writes = write_gradients(inputs, states, outputs)
    found = (outputs.dq_THK, writes.dk_THK, writes.dv_TNV, writes.dg_TN, writes.dbeta_TN)
    errors = {name: largest_error(x, leaf.grad) for name, x, leaf in zip(NAMES, found, leaves, strict=True)}
    assert all(gradient.dtype == dtype for gradient in (*found[:3], found[4]))
    assert {name: error for name, error in errors.items() if error > bounds[name]} == {}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds the products of fp32 to tf32, and trains in bf16")
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [((16, 16), (1, 1, 16, 16)), ((33, 1, 15), (2, 2, 16, 32)), ((5, 20), (1, 3, 24, 80))],
)
def test_fp32_equals_autograd(lengths: tuple[int, ...], shape: tuple[int, int, int, int]) -> None:
    # In fp32, as Triton's interpreter multiplies no matrices of bf16.
    check(lengths, shape, chunk_size=16, dtype=torch.float32, bounds=dict.fromkeys(NAMES, 2e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2, 128, 128), (1, 3, 64, 128), (1, 1, 96, 80)])
def test_bf16_equals_autograd_up_to_rounding(shape: tuple[int, int, int, int]) -> None:
    # The gradient of g is a small difference of large sums.
    check(
        (130, 1, 64, 63),
        shape,
        chunk_size=64,
        dtype=torch.bfloat16,
        bounds=dict.fromkeys(NAMES, 1e-2) | {"g": 5e-2},
    )
