"""Operations of the Gated DeltaNet mixer, at the 80B model's sizes and one micro-batch of 4 x 4096 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from op_case import BF16_BYTES, FP32_BYTES, Inputs, OpCase, Outputs, Work, normal

from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata

ROWS, LENGTH = 4, 4096
TOKENS = ROWS * LENGTH
HEADS = HeadShape(key_heads=16, value_heads=32, key_dim=128, value_dim=128)
COLUMNS = HEADS.key_heads * sum(HEADS.group_sizes)
WIDTH = 4
CHUNK = 64
EPS = 1e-6
PACKED = (1000, 3, 2000, 1093) * ROWS
"""Lengths of documents that fit no tile."""


def delta_net_cases() -> Iterator[OpCase]:
    """All cases."""
    yield gdn_prologue("delta rule inputs, dense rows", (LENGTH,) * ROWS)
    yield gdn_prologue("delta rule inputs, packed rows", PACKED)
    yield gated_delta_rule("gated delta rule, dense rows", (LENGTH,) * ROWS)
    yield gated_delta_rule("gated delta rule, packed rows", PACKED)
    yield gated_rms_norm()


def gdn_prologue(name: str, lengths: tuple[int, ...]) -> OpCase:
    """Convolution, SiLU, l2 norm and gates."""
    cuts: list[VarlenMetadata] = []

    def inputs(device: torch.device) -> Inputs:
        cuts.append(VarlenMetadata.from_lengths(lengths, device))
        return {
            "qkvz": normal(device, TOKENS, COLUMNS),
            "ba": normal(device, TOKENS, 2 * HEADS.value_heads),
            "weight": normal(device, HEADS.channels, WIDTH) / 2,
            "A_log": normal(device, HEADS.value_heads, dtype=torch.float32),
            "dt_bias": normal(device, HEADS.value_heads, dtype=torch.float32),
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return kernels.gdn_prologue(*inputs.values(), heads=HEADS, sequences=cuts[-1])

    convolved, gates = BF16_BYTES * TOKENS * HEADS.channels, TOKENS * HEADS.value_heads * (3 * BF16_BYTES + FP32_BYTES)
    z = BF16_BYTES * TOKENS * (COLUMNS - HEADS.channels)
    return OpCase(name, inputs, run, Work(2 * convolved + gates), Work(3 * convolved + 2 * z + 2 * gates))


def gated_delta_rule(name: str, lengths: tuple[int, ...]) -> OpCase:
    """The rule on what :func:`gdn_prologue` makes; FLOPs of the products of the chunked form."""
    cuts: list[VarlenMetadata] = []

    def inputs(device: torch.device) -> Inputs:
        cuts.append(VarlenMetadata.from_lengths(lengths, device))
        q, k = (normal(device, TOKENS, HEADS.key_heads, HEADS.key_dim) for _ in "qk")
        rate = torch.logspace(0, -3, HEADS.value_heads, device=device)
        return {
            "q_THK": torch.nn.functional.normalize(q, dim=-1),
            "k_THK": torch.nn.functional.normalize(k, dim=-1),
            "v_TNV": normal(device, TOKENS, HEADS.value_heads, HEADS.value_dim),
            "g_TN": -rate * torch.rand(TOKENS, HEADS.value_heads, device=device),
            "beta_TN": torch.rand(TOKENS, HEADS.value_heads, device=device).bfloat16(),
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return kernels.gated_delta_rule(**inputs, sequences=cuts[-1])[:1]

    k, v, rows = HEADS.key_dim, HEADS.value_dim, TOKENS * HEADS.value_heads
    operands = BF16_BYTES * TOKENS * HEADS.channels + rows * (FP32_BYTES + BF16_BYTES)
    out = BF16_BYTES * rows * v
    forward = Work(operands + out, rows * (6 * k * v + 2 * CHUNK * (3 * k + 2 * v)))
    backward = Work(2 * operands + out, rows * (16 * k * v + 2 * CHUNK * (10 * k + 5 * v)))
    return OpCase(name, inputs, run, forward, backward)


def gated_rms_norm() -> OpCase:
    """The norm of the delta rule's output, its gate beside other columns of the projection."""
    shape = (TOKENS, HEADS.key_heads, HEADS.group, HEADS.value_dim)

    def inputs(device: torch.device) -> Inputs:
        projection = normal(device, TOKENS, HEADS.key_heads, sum(HEADS.group_sizes))
        return {
            "x": normal(device, *shape),
            "gate": projection[..., -HEADS.group_sizes[-1] :].unflatten(-1, shape[2:]),
            "weight": 1 + normal(device, HEADS.value_dim) / 4,
        }

    def run(kernels: KernelSet, inputs: Inputs) -> Outputs:
        return (kernels.gated_rms_norm(inputs["x"], inputs["gate"], inputs["weight"], eps=EPS),)

    size = BF16_BYTES * TOKENS * HEADS.value_heads * HEADS.value_dim
    return OpCase("gated RMSNorm", inputs, run, Work(3 * size), Work(5 * size))
