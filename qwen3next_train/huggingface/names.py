"""Hugging Face tensors as ranges of our logical parameters, both ways.

Both sides bear the same names except for the routed experts: on disk each expert has its own three matrices
(``mlp.experts.7.gate_proj.weight`` ``[F, D]``, ``up_proj``, ``down_proj`` ``[D, F]``), in memory, here as in
transformers 5, a layer has two stacked ones (``mlp.experts.gate_up_proj`` ``[E, 2F, D]``, ``down_proj`` ``[E, D, F]``).
Since gate and up lie one above the other, every tensor on disk is one contiguous range of a flattened logical
tensor, and so neither direction ever has to assemble or split a stack in memory.

MTP names are those of the published checkpoints, of vLLM's ``qwen3_next_mtp`` and of Megatron-Bridge's
``Qwen3NextBridge``. Qwen3-Next-80B-A3B as published holds 81,324,862,720 parameters, all bf16, which is exactly the
parameter table with one MTP depth: there are no other tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qwen3next_train.parameters import ParamSpec

MTP_PREFIX = "mtp."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MTP_LAYER = re.compile(r"mtp\.layers\.(0|[1-9][0-9]*)\.")


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint.

    Args:
        name: its key on disk.
        shape: its shape on disk.
        parameter: the logical parameter that it is a part of.
        start: offset of its first element in the flattened logical tensor.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Offset behind its last element in the flattened logical tensor."""
        return self.start + self.numel


def on_disk(spec: ParamSpec) -> tuple[HfTensor, ...]:
    """The tensors that a parameter is on disk, in the order of their offsets; they tile it exactly."""
    if not spec.expert:
        return (in_memory(spec),)
    prefix, _, stacked = spec.name.rpartition(".")
    parts = _EXPERT_PARTS[stacked]
    num_experts, rows, columns = spec.shape
    shape = (rows // len(parts), columns)
    return tuple(
        HfTensor(f"{prefix}.{expert}.{part}.weight", shape, spec.name, (expert * len(parts) + index) * math.prod(shape))
        for expert in range(num_experts)
        for index, part in enumerate(parts)
    )


def in_memory(spec: ParamSpec) -> HfTensor:
    """A parameter as one tensor of its own name, as transformers holds it and as some tools save it."""
    return HfTensor(spec.name, spec.shape, spec.name, 0)


def mtp_layer(name: str) -> int | None:
    """Depth index of an ``mtp.layers.<k>.`` tensor; None for every other name."""
    match = _MTP_LAYER.match(name)
    return None if match is None else int(match[1])


def num_mtp_layers(names: Iterable[str]) -> int:
    """How many MTP depths a checkpoint with these tensors holds."""
    mtp = [name for name in names if name.startswith(MTP_PREFIX)]
    layers = {mtp_layer(name) for name in mtp} - {None}
    # A checkpoint that lost its MTP layer but kept the shared norms has one depth, and lacks tensors.
    return max(len(layers), 1) if mtp else 0
