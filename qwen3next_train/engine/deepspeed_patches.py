"""What depends on DeepSpeed's internals: replaced functions, private names, and what its import does to the process.

DeepSpeed is pinned for their sake; each says what it replaces and why. Expert layers, which DeepSpeed knows by their
class, are in ``engine.expert_block``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.runtime import compiler
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import defragment
from deepspeed.utils import groups

from qwen3next_train.optim.adamw import EagerAdamW, OnePassAdamW


def quiet_start() -> None:
    """Keep DeepSpeed from compilers when it is first used, from warnings at collectives and from waits at norms."""
    # DeepSpeed would make this table on first use, with setuptools and compilers, and look up this one entry: whether
    # to build a shared-memory collective in C++, on CPU, that gloo also has.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # ZeRO imports the Muon optimizer, decorated with torch.compile, whose import takes seconds of every rank's start.
    compiler.compile = lambda: compiler.dummy_decorator
    # Or it would warn that nobody has tried it with ours, which are torch's AdamW or tested against it.
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS = [EagerAdamW, OnePassAdamW]
    # DeepSpeed calls collectives by names that newer versions of torch have given up: one warning a call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # The original copies -1 from the host to the device, which waits for the device once for each optimizer group.
    stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mark_non_finite
    # A skipped step is said by the run's own line. The scale is 1 and stays.
    loss_scaler.LossScalerBase.update_scale = lambda self, overflow: None

    # What a rank has to itself is there. The original waits until the device has done all its work so far.
    partition_parameters._no_gather_coalesced = _WholeAlready


def _mark_non_finite(norm: torch.Tensor, device: object = None, val: float = -1.0) -> None:
    """Replace a norm that is not finite by ``val``, in place."""
    norm.masked_fill_(~torch.isfinite(norm), val)


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


@contextmanager
def patched_optimizers(
    partitioned: type[DeepSpeedZeroOptimizer], partitioned_parameters: type[DeepSpeedZeroOptimizer_Stage3]
) -> Iterator[None]:
    """Let DeepSpeed build ``partitioned`` under stages 1 and 2, ``partitioned_parameters`` of several dtypes under 3.

    Stage 3 puts all partitions into one flat buffer and asserts that they share a dtype, at one place
    (``runtime/zero/utils.py:defragment``); gathering, reducing and updating group parameters by dtype already.
    Qwen3-Next in bf16 keeps its router, ``A_log`` and ``dt_bias`` in fp32, so that one function is replaced by one
    that makes a buffer for each run of equal dtype while the optimizer is built. And the partitions of weights that a
    rank has to itself are the weights: grouped products read those of experts 16 bytes at a time, which other groups'
    partitions before them, a norm's share of a few elements, would shift. ``partitioned_parameters`` hands it the
    partitions by optimizer group, which have one dtype each and do not straddle two buffers.
    """
    deepspeed_engine.DeepSpeedZeroOptimizer = partitioned
    # The engine imports it where it builds one.
    stage3.DeepSpeedZeroOptimizer_Stage3 = partitioned_parameters
    stage3.defragment = _defragment_by_groups
    try:
        yield
    finally:
        deepspeed_engine.DeepSpeedZeroOptimizer = DeepSpeedZeroOptimizer
        stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3
        stage3.defragment = defragment


def order_by_one_stream(accelerator: DeepSpeedAccelerator, *, is_ordered: bool) -> None:
    """Let stage 3 not wait on the host for what the device's stream orders by itself.

    Stage 3 lets three weights be under way, in gathering and in reducing, and then has the host wait for the device, so
    that run-ahead on streams of its own does not pile up memory; behind every backward pass it waits for all
    reductions. Without ``overlap_comm`` its streams are the one that computes: memory is used again in the order of the
    program, and in a layer of more weights each wait is for all that was launched before the layer.

    Args:
        accelerator: DeepSpeed's, of this process, which its optimizers ask.
        is_ordered: as under stage 3 without ``overlap_comm``; otherwise what DeepSpeed says by itself, for the other
            stages' offload copies on another stream.
    """
    for answer in ("handles_memory_backpressure", "resolves_data_dependency"):
        if is_ordered:
            setattr(accelerator, answer, lambda: True)
        else:
            vars(accelerator).pop(answer, None)


def gather_one_by_one(parameters: Iterable[Any]) -> None:
    """Let stage 3 gather each weight into its place, in one order on all ranks.

    Weights that DeepSpeed gathers together are copied once more, by the host in as many pieces a weight as there are
    ranks, and are there twice meanwhile. Its ``stage3_allgather_sequential`` would gather a single weight ahead, and
    copy small ones of which a rank has the whole.

    It also hands them over as a Python set, and begins with the process group of whichever comes first. A layer has
    weights of several groups (dense, experts, divided heads), and ranks that start collectives of several NCCL
    communicators in different orders may wait for one another for ever.

    Args:
        parameters: that stage 3 has partitioned.
    """
    for parameter in parameters:
        parameter.all_gather_coalesced = partial(_gather_each, parameter.all_gather_coalesced)


def _gather_each(gather: Callable[..., Any], parameters: Iterable[Any], **settings: bool) -> Any:
    in_order = sorted(parameters, key=lambda parameter: parameter.ds_id)
    return partition_parameters.MultipleAllGatherHandles([gather([parameter], **settings) for parameter in in_order])


class _WholeAlready:
    """Gathering weights that a rank has to itself: where it ends, DeepSpeed's own has the host wait for the device."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self._parameters = list(parameters)
        for parameter in self._parameters:
            parameter.ds_status = partition_parameters.ZeroParamStatus.INFLIGHT
            parameter.data = parameter.ds_tensor.data.view(parameter.ds_shape)

    def wait(self, **settings: bool) -> None:
        """Nothing has to arrive; asked again, for another weight's sake, it leaves what was released since."""
        for parameter in self._parameters:
            parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
        self._parameters.clear()


class PartitionedOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO-1 and ZeRO-2 that skip a non-finite step in bf16 too and reduce every gradient in fp32.

    For an offloaded optimizer; any other reduces and updates by ways of its own (``engine.gradient_buckets``,
    ``engine.partitioned_parameters``). DeepSpeed's class looks for non-finite gradients in bf16 only if its own bf16
    mode is on, which would cast the fp32 parameters, and then reads all gradients once more. Here the global norm
    decides, which is made anyhow and is the same on all ranks: it is finite exactly where the squares of all gradients
    are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_grad_overflow = True

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: ``step`` asks the norm right after this, whatever this finds."""

    def step(self, closure: None = None) -> None:
        """Clip and update, or clear the gradients of a step that is skipped."""
        super().step(closure)
        if self.overflow:
            # DeepSpeed leaves those of an offloaded optimizer, and the next step's would be added to them.
            self.averaged_gradients.update(dict.fromkeys(self.averaged_gradients))

    def unscale_and_clip_grads(self, grad_groups_flat: Sequence[torch.Tensor], total_norm: torch.Tensor) -> None:
        """Clip to the global norm; DeepSpeed waits for the device here, once a group, to look at the norm again."""
        if self.clip_grad > 0:
            factor = 1.0 / torch.clamp((total_norm + 1e-6) / self.clip_grad, min=1.0)
            for grad in grad_groups_flat:
                grad.data.mul_(factor)

    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        # Under stage 2 DeepSpeed's bucket has the first parameter's dtype, bf16, to which the gradients of the router,
        # A_log and dt_bias would be rounded before they are summed over ranks and micro-batches.
        return self.gradient_accumulation_dtype


_ALIGNED_NUMEL = 8
"""Elements of bf16 in 16 bytes."""


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


def _defragment_by_groups(groups: list[list[torch.Tensor]]) -> torch.Tensor | _Buffers:
    """Groups behind one another; a buffer begins where the dtype changes or a group would begin off 16 bytes."""
    runs: list[list[torch.Tensor]] = []
    for group in groups:
        behind = runs[-1] if runs else []
        if not behind or behind[0].dtype != group[0].dtype or sum(map(torch.Tensor.numel, behind)) % _ALIGNED_NUMEL:
            runs.append([])
        runs[-1] += group
    buffers = [defragment(run) for run in runs]
    return buffers[0] if len(buffers) == 1 else _Buffers(buffers)
