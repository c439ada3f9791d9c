"""The gradients' sum in one pass, in fp32, rounded once: the reference reads and writes memory for each addition.

Nothing is saved for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3next_train.kernels.gates import MAX_CONSUMERS, SharedInputFunction
from qwen3next_train.kernels.triton.row_programs import ceil_div, row_warps

_BLOCK = 2048
"""Elements of a program."""


def shared_input_triton(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Gradients are added in fp32, in the order of the consumers, and rounded once."""
    return _SharedInput.apply(x, count)


class _SharedInput(SharedInputFunction):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        terms = [grad.contiguous() for grad in grads if grad is not None]
        return (_total(terms) if len(terms) > 1 else next(iter(terms), None)), None


def _total(terms: list[torch.Tensor]) -> torch.Tensor:
    total = torch.empty_like(terms[0])
    missing = [None] * (MAX_CONSUMERS - len(terms))
    _add[(ceil_div(total.numel(), _BLOCK),)](
        *terms, *missing, total, total.numel(), COUNT=len(terms), BLOCK=_BLOCK, num_warps=row_warps(_BLOCK)
    )
    return total


@triton.jit
def _add(first, second, third, fourth, total, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    value = tl.load(first + place, mask=mask).to(tl.float32) + tl.load(second + place, mask=mask).to(tl.float32)
    if COUNT > 2:
        value += tl.load(third + place, mask=mask).to(tl.float32)
    if COUNT > 3:
        value += tl.load(fourth + place, mask=mask).to(tl.float32)
    tl.store(total + place, value.to(total.dtype.element_ty), mask=mask)
