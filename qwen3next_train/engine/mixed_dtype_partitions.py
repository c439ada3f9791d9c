"""ZeRO-3 for a model whose parameters have two dtypes.

DeepSpeed's stage 3 puts all partitions into one flat buffer and asserts that they share a dtype, at one place
(``runtime/zero/utils.py:defragment``); gathering, reducing and updating group parameters by dtype already.
Qwen3-Next in bf16 keeps its router, ``A_log`` and ``dt_bias`` in fp32, so that one function is replaced by one
that makes a buffer for each run of equal dtype while the optimizer is built. Optimizer groups have one dtype
each, so no partition of a group straddles two buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import defragment


class _Buffers:
    """Several flat buffers behind one another, of which stage 3 takes pieces by offset."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = buffers

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Elements ``[start, start + length)`` of the whole; they lie in one buffer."""
        for buffer in self._buffers:
            if start < buffer.numel() or (length == 0 and start == buffer.numel()):
                return buffer.narrow(dim, start, length)
            start -= buffer.numel()
        raise IndexError("beyond the last buffer")


@contextmanager
def mixed_dtype_partitions() -> Iterator[None]:
    """Let a ZeRO-3 optimizer built inside hold parameters of several dtypes."""
    stage3.defragment = _defragment_by_dtype
    try:
        yield
    finally:
        stage3.defragment = defragment


def _defragment_by_dtype(tensors: list[torch.Tensor]) -> torch.Tensor | _Buffers:
    buffers = [defragment(list(run)) for _, run in groupby(tensors, key=lambda tensor: tensor.dtype)]
    return buffers[0] if len(buffers) == 1 else _Buffers(buffers)
