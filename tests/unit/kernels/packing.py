"""Packed documents for the kernels' tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from qwen3next_train.kernels.varlen import VarlenMetadata

CPU = torch.device("cpu")


def documents(*lengths: int) -> VarlenMetadata:
    """Documents of these lengths on CPU."""
    return VarlenMetadata.from_lengths(lengths, CPU)


def spans(lengths: Sequence[int]) -> list[slice]:
    """The slice of each document in the flattened batch."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]
