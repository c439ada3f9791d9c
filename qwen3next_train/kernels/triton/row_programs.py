"""How the Triton kernels that work on rows are laid out over a device."""

from __future__ import annotations

import functools

import torch

_PROGRAMS_PER_PROCESSOR = 4
_ELEMENTS_PER_THREAD = 16
_THREADS_PER_WARP = 32


def ceil_div(number: int, divisor: int) -> int:
    """Quotient of two positive whole numbers, rounded up.

    ``triton.cdiv`` and ``triton.next_power_of_2``, which kernels may call too, take the host a tenth of a launch.
    """
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than a positive whole number."""
    return 1 << (number - 1).bit_length()


def row_warps(elements: int) -> int:
    """Warps of a program that holds this many elements (a power of two) at once."""
    return min(16, max(1, elements // (_ELEMENTS_PER_THREAD * _THREADS_PER_WARP)))


def num_row_programs(num_blocks: int, device: torch.device) -> int:
    """Programs of a kernel that sums over rows: a few on every multiprocessor, each with every n-th block.

    The same number on every device of a kind, so that repeated sums are equal bit for bit.
    """
    return max(1, min(num_blocks, _PROGRAMS_PER_PROCESSOR * num_processors(device)))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 on CPU, where the interpreter runs one program after the other."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix of rows over its last dimension, each dense; copied only where there is no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
