"""ZeRO-3 whose gradients are summed where AdamW reads them, as far as a rank has weights to itself.

DeepSpeed's stage 3 lets autograd make each micro-batch's gradient in bf16, casts it into a bucket, divides it, reduces
it to the ranks that share the weight and adds what arrives to an fp32 partition. Before the update it reads the
partitions in fp64 for the norm, copies them, reads and writes the copy to clip, and copies the updated masters to bf16.

A weight that nobody shares, as a rank's own experts where they are divided among all ranks, is its own partition, and
there is nothing to reduce: the partition is the weight's ``main_grad``
(:class:`~qwen3next_train.kernels.main_grad.MainGrad`), to which backward passes add, the experts' grouped GEMM in its
epilogue. Clipping, the skipping of a non-finite step and the rounding of the updated weights happen inside AdamW
(:class:`~qwen3next_train.optim.adamw.OnePassAdamW`), for all weights.

Gradients of weights that several ranks share are cast as they are laid out for the ranks and summed over them beside
the passes that follow.

Construction, partitions, master weights, gathering and which shared gradients travel together stay DeepSpeed's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from qwen3next_train.engine.clipped_update import ClippedUpdate
from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of


class PartitionedParameterOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 with gradients of unshared weights in place and one pass for the update, see the module.

    Gradients are summed over ranks, not averaged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # DeepSpeed's constructor makes the hooks, and these the sums.
        self._partitions: dict[Any, MainGrad] = {}
        # Elements of each reduction that is under way, and what waits for it and adds what it brings.
        self._under_way: deque[tuple[int, Callable[[], None]]] = deque()
        super().__init__(*args, **kwargs)
        shared = [parameter.ds_numel for parameter in self._partitions if main_grad_of(parameter) is None]
        self._max_under_way = max(self.reduce_bucket_size, *shared, 0)
        start = 0
        for index, master in enumerate(self.fp32_partitioned_groups_flat):
            # DeepSpeed has emptied the optimizer's groups, to fill them for each update.
            self.optimizer.param_groups[self.sub_group_to_group_id[index]]["params"].append(master)
            self.optimizer.published[master] = self.fp16_partitioned_groups_flat[index]
            self.optimizer.gradients[master] = self.grad_partitions_flat_buffer.narrow(0, start, master.numel())
            start += master.numel()
        self._update = ClippedUpdate(self.optimizer, self.clip_grad, self.dp_process_group)

    # What DeepSpeed calls.

    def _get_parameter_partitions(self) -> list[list[torch.Tensor]]:
        """By group, for the buffers of :func:`~qwen3next_train.engine.deepspeed_patches.patched_optimizers`."""
        return [[parameter.ds_tensor for parameter in group] for group in self.fp16_groups]

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """DeepSpeed's hooks, and one for each weight that nobody shares, which its leaf modules pass over then."""
        start = 0
        for parameter in (parameter for group in self.fp16_groups for parameter in group):
            numel = parameter.partition_numel()
            # The last ranks' parts end in padding, which stays zero, or are nothing else.
            own_numel = max(0, min(numel, parameter.ds_numel - self._get_param_partition_rank(parameter) * numel))
            values = self.grad_partitions_flat_buffer.narrow(0, start, own_numel)
            if self._get_param_partition_world_size(parameter) == 1:
                parameter.main_grad = self._partitions[parameter] = MainGrad(values.view(parameter.ds_shape))
            else:
                self._partitions[parameter] = MainGrad(values)
            start += numel
        super().create_reduce_and_remove_grad_hooks()
        for parameters in self.leaf_parameters.values():
            unshared = [parameter for parameter in parameters if main_grad_of(parameter) is not None]
            # In place: the modules' hooks have these lists.
            parameters[:] = [parameter for parameter in parameters if main_grad_of(parameter) is None]
            for parameter in unshared:
                hook = parameter.register_post_accumulate_grad_hook(self.reduce_ready_partitions_and_remove_grads)
                self._grad_acc_hooks.append(hook)

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter) -> None:
        """Sum what autograd brings of an unshared weight; of others collect it, in DeepSpeed's buckets."""
        main_grad = main_grad_of(param)
        if main_grad is None:
            super().reduce_ready_partitions_and_remove_grads(param)
        elif param.grad is not None:
            main_grad.add(param.grad)
            param.grad = None

    def _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(
        self, communication_data_type: torch.dtype
    ) -> None:
        """Begin to sum a bucket over the ranks, beside the backward pass, or the next forward pass.

        No more is under way than a bucket holds, or the largest weight.

        The original waits for it, and divides first, which reads and writes all once more. These are sums, since what
        is summed in place is not divided either.
        """
        bucket = self.ipg_buckets[communication_data_type]
        if not bucket.params:
            return
        self._finish_reductions(beyond=self._max_under_way - bucket.elements)
        parameters = sorted(bucket.params, key=lambda parameter: parameter.ds_id)
        assert len(set(parameters)) == len(parameters), "a gradient came twice in one backward pass"
        gradients = [parameter.grad for parameter in parameters]
        receive = begin_sum_to_owners(gradients, bucket.process_group, dtype=communication_data_type)
        for parameter in parameters:
            parameter.grad = None

        def finish() -> None:
            for parameter, part in zip(parameters, receive(), strict=True):
                self._partitions[parameter].add(part)

        self._under_way.append((bucket.elements, finish))
        bucket.clear_params()

    def step(self, closure: None = None) -> None:
        """Update this rank's partitions; a step whose gradient is not finite changes nothing."""
        self._pre_step()
        self._partition_all_parameters()
        self._finish_reductions(beyond=0)
        for partition in self._partitions.values():
            partition.finish()
        self._global_grad_norm = self._update.run()
        for partition in self._partitions.values():
            partition.is_empty = True
        self._post_step(set())

    # Ours.

    def outcome(self) -> tuple[float, bool]:
        """Gradient norm of the last step, infinite if it is not finite, and whether the step was therefore skipped."""
        return self._update.outcome()

    def _finish_reductions(self, *, beyond: int) -> None:
        """Add what the oldest reductions bring, until no more elements are under way."""
        while self._under_way and sum(numel for numel, _ in self._under_way) > beyond:
            _, finish = self._under_way.popleft()
            finish()


def begin_sum_to_owners(
    gradients: Sequence[torch.Tensor], group: dist.ProcessGroup, *, dtype: torch.dtype
) -> Callable[[], list[torch.Tensor]]:
    """Begin to sum over the ranks of ``group``, of which each receives an equal part of each gradient; the last less.

    Args:
        gradients: of the same shapes on all ranks; copied.
        group: the ranks.
        dtype: in which gradients travel and are summed.

    Returns:
        what waits for this rank's parts, flat and without padding: shorter than they are laid out, also empty, where
        the ranks before have all. On CUDA the device waits, not the host.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [-(-gradient.numel() // num_ranks) for gradient in gradients]
    lengths = [max(0, min(size, g.numel() - rank * size)) for g, size in zip(gradients, sizes, strict=True)]
    # A row for each rank.
    sent = gradients[0].new_empty(num_ranks, sum(sizes), dtype=dtype)
    for gradient, columns in zip(gradients, sent.split(sizes, dim=1), strict=True):
        _fill_rows(columns, gradient.reshape(-1))
    received = sent.new_empty(sent.shape[1])
    work = dist.reduce_scatter_tensor(received, sent.view(-1), group=group, async_op=True)

    def receive() -> list[torch.Tensor]:
        nonlocal sent
        work.wait()
        # Not earlier: its memory would be used again before the reduction has read it.
        del sent
        return [part[:length] for part, length in zip(received.split(sizes), lengths, strict=True)]

    return receive


def _fill_rows(rows: torch.Tensor, values: torch.Tensor) -> None:
    """Row by row, in the dtype of the rows; the rest, of which nobody takes the sums, stays as it is."""
    num_full, rest = divmod(values.numel(), rows.shape[1])
    rows[:num_full] = values[: num_full * rows.shape[1]].view(num_full, -1)
    if rest:
        rows[num_full, :rest] = values[values.numel() - rest :]
