"""ZeRO-1 whose gradients are summed in the buffers they are reduced from.

DeepSpeed's stage 1 adds each micro-batch's gradient to an fp32 tensor of its own, copies that into a bucket, divides,
all-reduces the whole bucket, copies this rank's share out of it, reads it twice for the norm and once more to clip.
Here an optimizer group is a bucket: one flat buffer laid out like the group's flat weights, of which every
parameter has a view, ``main_grad`` (:class:`~qwen3next_train.kernels.main_grad.MainGrad`). Backward passes add to it,
the experts' grouped GEMM in its epilogue. During the step's last one a
bucket is reduce-scattered as soon as its last gradient is there; the partition that this rank receives is what AdamW
reads. Clipping, the skipping of a non-finite step and the rounding of the updated weights happen inside AdamW
(:class:`~qwen3next_train.optim.adamw.OnePassAdamW`): no pass of their own, and no wait for the device.

Construction, flattening, partitions, master weights and groups stay DeepSpeed's, and so do stages 2 and 3 and offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen3next_train.engine.deepspeed_patches import PartitionedOptimizer
from qwen3next_train.engine.host_copy import HostCopy
from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of

BUCKET_NUMEL = 100_000_000
"""Elements of an optimizer group, unless one parameter has more."""


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


@dataclass
class _Bucket:
    """The gradients of one optimizer group.

    Args:
        gradients: as long as the group's flat weights.
        partition: this rank's part of it.
        parameters: those of the group.
        process_group: ranks that share it.
        expected: gradients that arrive in one backward pass (several of a parameter that several recomputed parts use);
            0 until one is over.
        arrived: gradients that have arrived in the present one.
        missing: parameters of which none has, and maybe none had in earlier ones.
        pending: finishes the reduction that was launched.
    """

    gradients: torch.Tensor
    partition: torch.Tensor
    parameters: list[nn.Parameter]
    process_group: dist.ProcessGroup
    expected: int = 0
    arrived: int = 0
    missing: set[nn.Parameter] = field(default_factory=set)
    pending: Callable[[], None] | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that share the bucket."""
        return dist.get_world_size(self.process_group)

    @property
    def is_complete(self) -> bool:
        """Whether no further gradient of the present backward pass is to be expected."""
        return self.arrived == self.expected and not self.missing

    def add(self, parameter: nn.Parameter) -> None:
        """Sum the gradient that has come."""
        assert parameter.grad is not None
        self.arrived += 1
        self.missing.discard(parameter)
        _main_grad(parameter).add(parameter.grad)
        parameter.grad = None

    def launch(self) -> None:
        """Begin to sum over the ranks; each receives its partition."""
        for parameter in self.parameters:
            _main_grad(parameter).finish()
        if self.num_ranks == 1:
            self.pending = _nothing
            return
        # NCCL takes a part of the input as output, gloo does not.
        in_place = self.gradients.device.type == "cuda"
        received = self.partition if in_place else torch.empty_like(self.partition)
        work = dist.reduce_scatter_tensor(received, self.gradients, group=self.process_group, async_op=True)

        def finish() -> None:
            work.wait()
            if not in_place:
                self.partition.copy_(received)

        self.pending = finish


def _main_grad(parameter: nn.Parameter) -> MainGrad:
    found = main_grad_of(parameter)
    assert found is not None
    return found


def _nothing() -> None:
    """What is left to do for a bucket that is not shared."""


class GradientBucketOptimizer(PartitionedOptimizer):
    """ZeRO-1 on gradient buckets, see the module.

    Gradients are summed over ranks, not averaged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # DeepSpeed's constructor makes the hooks, which know their bucket by its number.
        self._buckets: list[_Bucket] = []
        super().__init__(*args, **kwargs)
        assert self.partition_gradients is self.cpu_offload is self.overlap_comm is False
        self._order: list[_Bucket] = []
        self._num_launched = 0
        self._gathers: dict[int, dist.Work] = {}
        self._outcome = HostCopy(torch.zeros(2))

    def allocate(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        """Make the buckets, and fix the order in which all ranks reduce them: that in which backward passes fill them.

        Args:
            parameters: all, in the order in which forward passes use them first; backward passes go the other way.
            dtype: of the gradients; those of fp32 weights are fp32.
        """
        for index, weights in enumerate(self.bit16_groups_flat):
            self._buckets.append(self._bucket(index, weights, dtype))
        position = {parameter: index for index, parameter in enumerate(parameters)}
        self._order = sorted(self._buckets, key=lambda b: min(map(position.__getitem__, b.parameters)), reverse=True)
        for index, master in enumerate(self.single_partition_of_fp32_groups):
            self.optimizer.published[master] = self._own_weights(index)
            self.optimizer.gradients[master] = self._buckets[index].partition

    def _bucket(self, index: int, weights: torch.Tensor, dtype: torch.dtype) -> _Bucket:
        dtype = torch.float32 if weights.dtype == torch.float32 else dtype
        gradients = torch.zeros(weights.numel(), dtype=dtype, device=weights.device)
        offsets = self.round_robin_bit16_offsets[index]
        for parameter, offset in zip(self.round_robin_bit16_groups[index], offsets, strict=True):
            parameter.main_grad = MainGrad(gradients.narrow(0, offset, parameter.numel()).view(parameter.shape))
        process_group = self.real_dp_process_group[index]
        size = self.partition_size[index]
        partition = gradients.narrow(0, dist.get_rank(process_group) * size, size)
        parameters = list(self.bit16_groups[index])
        return _Bucket(gradients, partition, parameters, process_group, missing=set(parameters))

    # What DeepSpeed calls.

    def create_gradient_handling_hooks(self) -> None:
        """One hook a parameter, which autograd calls when a gradient has been added to ``parameter.grad``."""
        for index, group in enumerate(self.bit16_groups):
            for parameter in group:
                hook = self._hook(index)
                self._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Launch what was not launched in the backward pass that has ended, the step's last."""
        self._launch(self._order)

    def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
        """A backward pass is over: how many gradients arrive in one is known from now on."""
        for bucket in self._buckets:
            bucket.expected, bucket.arrived = max(bucket.expected, bucket.arrived), 0
            bucket.missing.update(bucket.parameters)

    def fill_grad_accum_attribute(self) -> None:
        """Nothing: gradients are where they belong."""

    def step(self, closure: None = None) -> None:
        """Update this rank's partitions and gather the weights; a step whose gradient is not finite changes nothing."""
        for bucket in self._buckets:
            assert bucket.pending is not None, "a step without a backward pass"
            bucket.pending()
            bucket.pending = None
        norm = self._gradient_norm()
        non_finite = (~torch.isfinite(norm)).float()
        self._global_grad_norm = norm.masked_fill(~torch.isfinite(norm), torch.inf)
        # On its way before the update is launched, so that the host can prepare the next step during the update.
        self._outcome = HostCopy(torch.stack([self._global_grad_norm, non_finite]))
        scale = torch.clamp((norm + 1e-6) / self.clip_grad, min=1.0) if self.clip_grad > 0 else torch.ones_like(norm)
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, non_finite
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        for index in range(len(self._buckets)):
            self._gather_weights(index)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                _main_grad(parameter).is_empty = True
        self._num_launched = 0

    def update_lp_params(self) -> None:
        """Bring the weights up to the master weights, after those were loaded."""
        self.wait_for_weights()
        super().update_lp_params()

    # Ours.

    def outcome(self) -> tuple[float, bool]:
        """Gradient norm of the last step, infinite if it is not finite, and whether the step was therefore skipped."""
        norm, non_finite = self._outcome.read().tolist()
        return norm, bool(non_finite)

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
            assert bucket.pending is None, "a gradient arrived after its bucket had been reduced"
            bucket.add(parameter)
            if self.is_gradient_accumulation_boundary():
                # Only what stands next in the order, so that all ranks launch alike.
                waiting = self._order[self._num_launched :]
                self._launch(takewhile(lambda b: b.is_complete, waiting))

        return arrived

    def _launch(self, buckets: Iterable[_Bucket]) -> None:
        for bucket in buckets:
            if bucket.pending is None:
                bucket.launch()
                self._num_launched += 1

    def _gradient_norm(self) -> torch.Tensor:
        """Norm over all parameters: partitions of all ranks are disjoint, of experts as well."""
        partitions = [bucket.partition for bucket in self._buckets]
        if partitions[0].device.type == "cpu":
            # A sum of a million fp32 numbers in a row is off by 1e-4 there; CUDA adds them up as a tree.
            partitions = [partition.double() for partition in partitions]
        norms = [torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in partitions]
        squares = torch.stack(norms).square().sum().float()
        dist.all_reduce(squares, group=self.dp_process_group)
        return squares.sqrt()

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
