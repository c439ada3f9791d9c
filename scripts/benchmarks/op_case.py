"""What the benchmark of single operations knows of one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qwen3next_train.kernels.selection import KernelSet

BF16_BYTES = 2
FP32_BYTES = 4
INT64_BYTES = 8

Inputs = Mapping[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Work:
    """What one pass cannot do without.

    Args:
        num_bytes: read and written once, if everything is read and written once.
        flops: of matrix products.
    """

    num_bytes: int
    flops: int = 0


@dataclass(frozen=True)
class OpCase:
    """One operation at one shape.

    Args:
        name: of the operation and of what is special about the shape.
        inputs: makes the inputs on a device; gradients are taken of all floating-point ones.
        run: calls the operation of the given set.
        forward: least work of the forward pass.
        backward: least work of the backward pass.
    """

    name: str
    inputs: Callable[[torch.device], Inputs]
    run: Callable[[KernelSet, Inputs], Outputs]
    forward: Work
    backward: Work


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Standard normal values on the device."""
    return torch.randn(shape, device=device, dtype=dtype)
