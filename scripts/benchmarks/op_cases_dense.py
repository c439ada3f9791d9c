"""Norms, attention and loss, at the 80B model's sizes and one micro-batch of 4 x 4096 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from op_case import BF16_BYTES, Inputs, OpCase, Outputs, Work, normal

from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.rope import RotaryTable, rotary_table

ROWS, LENGTH = 4, 4096
TOKENS, HIDDEN, VOCABULARY = ROWS * LENGTH, 2048, 151936
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 256
EPS = 1e-6


def dense_cases() -> Iterator[OpCase]:
    """All cases."""
    yield rms_norm()
    yield pass_and_rms_norm()
    yield add_and_rms_norm()
    yield qk_norm_rope("query norm + rotary", HEADS, 2 * HEAD_DIM)
    yield qk_norm_rope("key norm + rotary", KV_HEADS, HEAD_DIM)
    yield output_gate()
    yield attention("attention, dense rows", (LENGTH,) * ROWS)
    yield attention("attention, packed rows", (1000, 3, 2000, 1093) * ROWS)
    yield linear_cross_entropy()


def rms_norm() -> OpCase:
    """The norm before the head."""

    def inputs(device: torch.device) -> Inputs:
        return {"x": normal(device, TOKENS, HIDDEN), "weight": normal(device, HIDDEN) / 4}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return (kernels.rms_norm.normalize(inputs["x"], inputs["weight"], eps=EPS),)

    size = BF16_BYTES * TOKENS * HIDDEN
    return OpCase("RMSNorm", inputs, run, Work(2 * size), Work(3 * size))


def pass_and_rms_norm() -> OpCase:
    """The norm before a mixer; its backward adds the gradient of the residual stream."""

    def inputs(device: torch.device) -> Inputs:
        return {"x": normal(device, TOKENS, HIDDEN), "weight": normal(device, HIDDEN) / 4}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return kernels.rms_norm.rms_norm_with_residual(inputs["x"], inputs["weight"], eps=EPS)

    size = BF16_BYTES * TOKENS * HIDDEN
    return OpCase("stream + RMSNorm", inputs, run, Work(2 * size), Work(4 * size))


def add_and_rms_norm() -> OpCase:
    """Residual sum and norm before the experts."""

    def inputs(device: torch.device) -> Inputs:
        x, y = (normal(device, TOKENS, HIDDEN) for _ in range(2))
        return {"x": x, "y": y, "weight": normal(device, HIDDEN) / 4}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return kernels.rms_norm.fused_add_rms_norm(inputs["x"], inputs["y"], inputs["weight"], eps=EPS)

    size = BF16_BYTES * TOKENS * HIDDEN
    return OpCase("sum + RMSNorm", inputs, run, Work(4 * size), Work(4 * size))


def qk_norm_rope(name: str, heads: int, width: int) -> OpCase:
    """Norm and rotary embedding of heads that are the first parts of ``width`` columns each.

    The backward pass that is timed also spreads its result over those columns.
    """
    tables: list[RotaryTable] = []

    def inputs(device: torch.device) -> Inputs:
        tables.append(rotary_table(torch.arange(TOKENS, device=device), head_dim=HEAD_DIM, fraction=0.25, theta=1e7))
        return {"x": normal(device, TOKENS, heads, width), "weight": normal(device, HEAD_DIM) / 4}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        angles = tables[-1].cos_T1r, tables[-1].sin_T1r
        return (kernels.qk_norm_rope(inputs["x"][..., :HEAD_DIM], inputs["weight"], *angles, eps=EPS),)

    size, spread = (BF16_BYTES * TOKENS * heads * columns for columns in (HEAD_DIM, width))
    return OpCase(name, inputs, run, Work(2 * size), Work(3 * size + (2 * spread if width > HEAD_DIM else 0)))


def output_gate() -> OpCase:
    """The gate, the second half of the query projection."""

    def inputs(device: torch.device) -> Inputs:
        return {"x": normal(device, TOKENS, HEADS, HEAD_DIM), "gate": normal(device, TOKENS, HEADS, HEAD_DIM)}

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return (kernels.output_gate(inputs["x"], inputs["gate"]),)

    size = BF16_BYTES * TOKENS * HEADS * HEAD_DIM
    return OpCase("output gate", inputs, run, Work(3 * size), Work(5 * size))


def attention(name: str, lengths: tuple[int, ...]) -> OpCase:
    """Causal attention with 16 query and 2 key/value heads."""

    def inputs(device: torch.device) -> Inputs:
        return {
            "q_TNH": normal(device, TOKENS, HEADS, HEAD_DIM),
            "k_TGH": normal(device, TOKENS, KV_HEADS, HEAD_DIM),
            "v_TGH": normal(device, TOKENS, KV_HEADS, HEAD_DIM),
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        sequences = VarlenMetadata.from_lengths(lengths, inputs["q_TNH"].device)
        return (kernels.varlen_attention(**inputs, sequences=sequences),)

    # Half of each document's square is visible; two products forward, five backward (scores again).
    product = sum(length**2 for length in lengths) * HEADS * HEAD_DIM
    q_bytes, kv_bytes = (BF16_BYTES * TOKENS * heads * HEAD_DIM for heads in (HEADS, KV_HEADS))
    forward = Work(2 * q_bytes + 2 * kv_bytes, 2 * product)
    return OpCase(name, inputs, run, forward, Work(4 * q_bytes + 4 * kv_bytes, 5 * product))


def linear_cross_entropy() -> OpCase:
    """Output head and loss. The gradients count as backward, though the forward pass of training computes them."""

    def inputs(device: torch.device) -> Inputs:
        return {
            "hidden_TD": normal(device, TOKENS, HIDDEN),
            "weight_VD": normal(device, VOCABULARY, HIDDEN) * HIDDEN**-0.5,
            "labels_T": torch.randint(VOCABULARY, (TOKENS,), device=device),
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return (kernels.linear_cross_entropy(**inputs),)

    weight, hidden = BF16_BYTES * VOCABULARY * HIDDEN, BF16_BYTES * TOKENS * HIDDEN
    logits = BF16_BYTES * TOKENS * VOCABULARY
    flops = 2 * TOKENS * VOCABULARY * HIDDEN
    # Logits are written and read once; then their gradient takes their place, which both products read.
    forward = Work(2 * logits + weight + hidden, flops)
    return OpCase("linear + cross entropy", inputs, run, forward, Work(3 * logits + 4 * (weight + hidden), 2 * flops))
