"""What depends on DeepSpeed's internals: replaced functions, private names, and what its import does to the process.

DeepSpeed is pinned for their sake; each says what it replaces and why. Expert layers, which DeepSpeed knows by their
class, are in ``engine.expert_block``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import defragment
from deepspeed.utils import groups


def quiet_start() -> None:
    """Keep DeepSpeed from compilers when it is first used, and from a warning at every collective."""
    # Built on first use by a C++ compiler otherwise, on CPU, for a shared-memory collective gloo also has.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO imports the Muon optimizer, decorated with torch.compile, whose import takes seconds of every rank's start.
    compiler.compile = lambda: compiler.dummy_decorator
    # DeepSpeed calls collectives by names that newer versions of torch have given up: one warning a call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def set_group_timeouts(timeout_s: float) -> None:
    """Let the groups that DeepSpeed has made give up after ``timeout_s`` seconds.

    It makes them with torch's defaults (10 minutes for NCCL, 30 for gloo) and has no setting for it. To be called
    once it has made them all.
    """
    made = [
        groups._get_data_parallel_group(),
        *groups._get_expert_parallel_group_dict().values(),
        *groups._get_expert_data_parallel_group_dict().values(),
    ]
    for group in made:
        # A rank outside of a group holds a placeholder.
        if isinstance(group, dist.ProcessGroup):
            group.set_timeout(timedelta(seconds=timeout_s))


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
    """Let a ZeRO-3 optimizer built inside hold parameters of several dtypes.

    DeepSpeed's stage 3 puts all partitions into one flat buffer and asserts that they share a dtype, at one place
    (``runtime/zero/utils.py:defragment``); gathering, reducing and updating group parameters by dtype already.
    Qwen3-Next in bf16 keeps its router, ``A_log`` and ``dt_bias`` in fp32, so that one function is replaced by one
    that makes a buffer for each run of equal dtype while the optimizer is built. Optimizer groups have one dtype
    each, so no partition of a group straddles two buffers.
    """
    stage3.defragment = _defragment_by_dtype
    try:
        yield
    finally:
        stage3.defragment = defragment


def _defragment_by_dtype(tensors: list[torch.Tensor]) -> torch.Tensor | _Buffers:
    buffers = [defragment(list(run)) for _, run in groupby(tensors, key=lambda tensor: tensor.dtype)]
    return buffers[0] if len(buffers) == 1 else _Buffers(buffers)
