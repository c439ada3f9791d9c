"""ZeRO-1 and ZeRO-2 whose gradients are summed in the buffers they are reduced from.

DeepSpeed's stage 1 adds each micro-batch's gradient to an fp32 tensor of its own, copies that into a bucket, divides,
all-reduces the whole bucket, copies this rank's share out of it, reads it twice for the norm and once more to clip.
Here an optimizer group is a bucket: one flat buffer laid out like the group's flat weights, of which every
parameter has a view, ``main_grad`` (:class:`~qwen3next_train.kernels.main_grad.MainGrad`). Backward passes add to it,
the experts' grouped GEMM in its epilogue. A bucket is reduce-scattered as soon as its last gradient is there; the
partition that this rank receives is what AdamW reads. Clipping, the skipping of a non-finite step and the rounding of
the updated weights happen inside AdamW (:class:`~qwen3next_train.optim.adamw.OnePassAdamW`): no pass of their own, and
no wait for the device.

Under stage 1 that is in the step's last backward pass, and the buffers stay. Under stage 2 it is in every one, and of
the buckets that several ranks share only the partitions stay, to which each pass adds its own: a buffer is there from
its first gradient of a pass until its reduction is over. What is under way is at most as large as the largest bucket.
The last ones of a pass travel during the next micro-batch's forward pass.

Construction, flattening, partitions, master weights and groups stay DeepSpeed's, and so does offload; stage 3 is in
``engine.partitioned_parameters``. To DeepSpeed both stages here are its first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen3next_train.engine.clipped_update import ClippedUpdate
from qwen3next_train.engine.deepspeed_patches import PartitionedOptimizer
from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of


def bucketed_groups(groups: Iterable[dict[str, Any]], *, max_numel: int) -> list[dict[str, Any]]:
    """Optimizer groups as ZeRO wants them: apart by the ranks that share them, each cut in the order of the table.

    Shared by all ranks, by those with the same experts, or by those with the same heads.

    All ranks get the same groups in the same order. DeepSpeed's own function for this iterates over a set of names.

    Args:
        groups: of :func:`~qwen3next_train.optim.param_groups.parameter_groups`.
        max_numel: elements of a group; a parameter that has more is a group by itself.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        # The empty name, of parameters that all ranks share, comes first.
        for name in sorted({_group_name(parameter) for parameter in group["params"]}):
            parameters = [parameter for parameter in group["params"] if _group_name(parameter) == name]
            # DeepSpeed finds the ranks that share a group by the group's name.
            marks = {"moe": True, "name": name} if name else {}
            found += [{**group, **marks, "params": part} for part in _cut(parameters, max_numel)]
    return found


def _group_name(parameter: nn.Parameter) -> str:
    """Of the ranks that share a parameter; empty for all."""
    name: str = "" if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]
    return name


def _cut(parameters: Sequence[nn.Parameter], max_numel: int) -> Iterator[list[nn.Parameter]]:
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(p.numel() for p in part) + parameter.numel() > max_numel:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


class _Bucket:
    """The gradients of one optimizer group: one buffer, laid out like the group's flat weights, and a part of it.

    The buffer stays, and the partition is a part of it; or it is lent, and the partition is memory of its own. A buffer
    that is lent is made for a backward pass when the first gradient is about to be written, and given up once its
    sum over the ranks has been taken into the partition.

    Args:
        parameters: those of the group, with the offset of each.
        weights: the group's flat weights, padding included.
        process_group: ranks that share it.
        dtype: of the gradients.
        stays: the buffer is there for good.
    """

    def __init__(
        self,
        parameters: dict[nn.Parameter, int],
        weights: torch.Tensor,
        process_group: dist.ProcessGroup,
        dtype: torch.dtype,
        *,
        stays: bool,
    ) -> None:
        self.parameters = list(parameters)
        self.process_group = process_group
        self.num_ranks = dist.get_world_size(process_group)
        # Without a gradient yet in the present backward pass.
        self.missing = set(self.parameters)
        self.is_launched = False
        self._shape, self._device, self._dtype = weights.shape, weights.device, dtype
        self._used = max(offset + parameter.numel() for parameter, offset in parameters.items())
        self._stays = stays
        self._buffer: torch.Tensor | None = None
        self._received: tuple[dist.Work, torch.Tensor] | None = None
        self._is_empty = True
        self._main_grads = [
            MainGrad(borrow=partial(self._view, offset, parameter.shape)) for parameter, offset in parameters.items()
        ]
        for parameter, main_grad in zip(self.parameters, self._main_grads, strict=True):
            parameter.main_grad = main_grad  # type: ignore[attr-defined]
        self.partition = (
            self._own_part(self._whole()) if stays else torch.zeros_like(self._own_part(weights), dtype=dtype)
        )

    @property
    def lent_bytes(self) -> int:
        """Of the buffer, if that is lent."""
        return 0 if self._stays else self._shape.numel() * self._dtype.itemsize

    @property
    def is_pending(self) -> bool:
        """Whether a reduction was launched that is not finished."""
        return self._received is not None

    def add(self, parameter: nn.Parameter) -> None:
        """Sum the gradient that has come."""
        assert parameter.grad is not None
        self.missing.discard(parameter)
        _main_grad(parameter).add(parameter.grad)
        parameter.grad = None

    def launch(self) -> None:
        """Begin to sum over the ranks; each receives its partition."""
        self.is_launched = True
        for main_grad in self._main_grads:
            main_grad.finish()
        if self.num_ranks == 1:
            return
        whole = self._whole()
        own = self._own_part(whole)
        # NCCL takes a part of the input as output, gloo does not.
        received = own if whole.device.type == "cuda" else torch.empty_like(own)
        work = dist.reduce_scatter_tensor(received, whole, group=self.process_group, async_op=True)
        self._received = work, received
        if not self._stays:
            # Those of the next pass are not to be written here.
            for main_grad in self._main_grads:
                main_grad.give_back()

    def finish(self) -> None:
        """Take into the partition what was received; on CUDA the device waits for it, not the host."""
        if self._received is None:
            return
        (work, received), self._received = self._received, None
        work.wait()
        self._take(received)
        if not self._stays:
            # Not earlier: its memory would be used again before the reduction has read it.
            self._buffer = None

    def end_pass(self) -> None:
        """A backward pass is over."""
        self.missing.update(self.parameters)
        self.is_launched = False

    def end_step(self) -> None:
        """The partition was used: sums begin anew."""
        self._is_empty = True
        if self._stays:
            for main_grad in self._main_grads:
                main_grad.is_empty = True

    def _take(self, received: torch.Tensor) -> None:
        """Add to the partition, or write it if it is the first of the step."""
        if self._is_empty:
            if received.data_ptr() != self.partition.data_ptr():
                self.partition.copy_(received)
        else:
            self.partition.add_(received)
        self._is_empty = False

    def _view(self, offset: int, shape: torch.Size) -> torch.Tensor:
        return self._whole().narrow(0, offset, shape.numel()).view(shape)

    def _whole(self) -> torch.Tensor:
        """The buffer."""
        # That of the pass before is in use until its reduction is over.
        self.finish()
        if self._buffer is None:
            self._buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._buffer[self._used :].zero_()
        return self._buffer

    def _own_part(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.chunk(self.num_ranks)[dist.get_rank(self.process_group)]


def _main_grad(parameter: nn.Parameter) -> MainGrad:
    found = main_grad_of(parameter)
    assert found is not None
    return found


class GradientBucketOptimizer(PartitionedOptimizer):
    """ZeRO-1 and ZeRO-2 on gradient buckets, see the module.

    Gradients are summed over ranks, not averaged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # DeepSpeed's constructor makes the hooks, which know their bucket by its number.
        self._buckets: list[_Bucket] = []
        super().__init__(*args, **kwargs)
        assert self.partition_gradients is self.cpu_offload is self.overlap_comm is False
        # The buckets in the order in which they are reduced: in a step's last pass, and in those before.
        self._order: list[_Bucket] = []
        self._order_before_last: list[_Bucket] = []
        self._num_launched = 0
        self._is_reduced = False
        self._under_way: list[_Bucket] = []
        self._max_lent_bytes = 0
        self._gathers: dict[int, dist.Work] = {}
        # Partitions of all ranks are disjoint, of experts as well.
        self._update = ClippedUpdate(self.optimizer, self.clip_grad, self.dp_process_group)

    def allocate(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype, *, partitions_only: bool) -> None:
        """Make the buckets, and fix the order in which all ranks reduce them: that in which backward passes fill them.

        Args:
            parameters: all, in the order in which forward passes use them first; backward passes go the other way.
            dtype: of the gradients; those of fp32 weights are fp32.
            partitions_only: between backward passes only partitions are held: stage 2.
        """
        for index, weights in enumerate(self.bit16_groups_flat):
            process_group = self.real_dp_process_group[index]
            offsets = self.round_robin_bit16_offsets[index]
            bucket = _Bucket(
                dict(zip(self.round_robin_bit16_groups[index], offsets, strict=True)),
                weights,
                process_group,
                torch.float32 if weights.dtype == torch.float32 else dtype,
                stays=not partitions_only or dist.get_world_size(process_group) == 1,
            )
            self._buckets.append(bucket)
        position = {parameter: index for index, parameter in enumerate(parameters)}
        self._order = sorted(self._buckets, key=lambda b: min(map(position.__getitem__, b.parameters)), reverse=True)
        self._order_before_last = [bucket for bucket in self._order if bucket.lent_bytes]
        self._max_lent_bytes = max(bucket.lent_bytes for bucket in self._buckets)
        for index, master in enumerate(self.single_partition_of_fp32_groups):
            self.optimizer.published[master] = self._own_weights(index)
            self.optimizer.gradients[master] = self._buckets[index].partition

    # What DeepSpeed calls.

    def create_gradient_handling_hooks(self) -> None:
        """One hook a parameter, which autograd calls when a gradient has been added to ``parameter.grad``."""
        for index, group in enumerate(self.bit16_groups):
            for parameter in group:
                hook = self._hook(index)
                self._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Nothing: ``backward_epilogue``, which comes next, launches what the backward pass has not."""

    def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
        """A backward pass is over: launch what still waits for a gradient that did not come."""
        self._launch(self._due())
        self._num_launched = 0
        self._is_reduced = self.is_gradient_accumulation_boundary()
        for bucket in self._buckets:
            bucket.end_pass()

    def fill_grad_accum_attribute(self) -> None:
        """Nothing: gradients are where they belong."""

    def step(self, closure: None = None) -> None:
        """Update this rank's partitions and gather the weights; a step whose gradient is not finite changes nothing."""
        assert self._is_reduced, "a step without a backward pass"
        self._is_reduced = False
        for bucket in self._order:
            bucket.finish()
        self._global_grad_norm = self._update.run()
        self._lazy_init_hp_params_optimizer_state()
        for index in range(len(self._buckets)):
            self._gather_weights(index)
        for bucket in self._buckets:
            bucket.end_step()

    def update_lp_params(self) -> None:
        """Bring the weights up to the master weights, after those were loaded."""
        self.wait_for_weights()
        super().update_lp_params()

    # Ours.

    def outcome(self) -> tuple[float, bool]:
        """Gradient norm of the last step, infinite if it is not finite, and whether the step was therefore skipped."""
        return self._update.outcome()

    def wait_for_weights(self, buckets: Iterable[int] | None = None) -> None:
        """Let the device's next work wait for gathered weights; on CPU wait for them.

        Args:
            buckets: whose weights are needed; None: all.
        """
        for index in list(self._gathers) if buckets is None else buckets:
            work = self._gathers.pop(index, None)
            if work is not None:
                work.wait()

    def buckets_of(self, module: nn.Module) -> frozenset[int]:
        """Numbers of the buckets that hold parameters of a module."""
        inside = set(module.parameters())
        return frozenset(i for i, bucket in enumerate(self._buckets) if not inside.isdisjoint(bucket.parameters))

    def _hook(self, index: int) -> Callable[[nn.Parameter], None]:
        def arrived(parameter: nn.Parameter) -> None:
            bucket = self._buckets[index]
            assert not bucket.is_launched, "a gradient arrived after its bucket had been reduced"
            bucket.add(parameter)
            if not bucket.missing:
                # Only what stands next in the order, so that all ranks launch alike.
                self._launch(takewhile(lambda b: not b.missing, self._due()))

        return arrived

    def _due(self) -> list[_Bucket]:
        """Buckets that this backward pass has yet to launch, in their order."""
        order = self._order if self.is_gradient_accumulation_boundary() else self._order_before_last
        return order[self._num_launched :]

    def _launch(self, buckets: Iterable[_Bucket]) -> None:
        for bucket in buckets:
            under_way = [each for each in self._under_way if each.is_pending]
            while under_way and sum(b.lent_bytes for b in [*under_way, bucket]) > self._max_lent_bytes:
                under_way.pop(0).finish()
            bucket.launch()
            self._under_way = [*under_way, bucket]
            self._num_launched += 1

    def _own_weights(self, index: int) -> torch.Tensor:
        """This rank's part of a group's flat weights."""
        own: torch.Tensor = self.parallel_partitioned_bit16_groups[index][
            dist.get_rank(self._buckets[index].process_group)
        ]
        return own

    def _gather_weights(self, index: int) -> None:
        """Begin to bring together a group's weights from the ranks that share it."""
        bucket = self._buckets[index]
        if bucket.num_ranks > 1:
            own = self._own_weights(index)
            # NCCL takes a part of the output as input, gloo does not.
            sent = own if own.device.type == "cuda" else own.clone()
            self._gathers[index] = dist.all_gather_into_tensor(
                self.bit16_groups_flat[index], sent, group=bucket.process_group, async_op=True
            )
