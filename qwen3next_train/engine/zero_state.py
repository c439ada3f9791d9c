"""Reading and writing the training state inside DeepSpeed's ZeRO optimizers, by logical parameter name.

ZeRO flattens each optimizer group and gives every rank a partition of it. Under stages 1 and 2 the group as a
whole is cut, under stage 3 each of its parameters. Where a parameter's piece lies is DeepSpeed's own record
(``_hp_mapping``; ``grad_position``). These are private attributes, which is why the version is pinned and this
file has its own tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment, FragmentKind, ReadFragment

_MOMENTS: tuple[FragmentKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """What a rank owns of one parameter.

    Args:
        name: logical parameter name.
        start: first element in the flattened logical tensor.
        partition: index of the flat fp32 partition it lies in.
        offset: first element in that partition.
        master: fp32 view of the master weights.
    """

    name: str
    start: int
    partition: int
    offset: int
    master: torch.Tensor


class ZeroState(ABC):
    """Training state of one rank.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer around AdamW.
        parameters: the engine module's parameters by logical name.
        expert_offsets: for expert parameters, the flat offset of this rank's first expert in the logical
            tensor; 0 for every other name is implied.
        moments_dtype: what AdamW keeps its moments in.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        expert_offsets: Mapping[str, int],
        *,
        moments_dtype: torch.dtype,
    ) -> None:
        self._zero = optimizer
        self._moments_dtype = moments_dtype
        self._parameters = parameters
        self._expert_offsets = expert_offsets

    def fragments(self) -> Iterator[Fragment]:
        """The state this rank owns; moments are zero before the first update."""
        for piece in self._pieces():
            state = self._adam_state(piece.partition)
            moments = {
                kind: state[kind].narrow(0, piece.offset, piece.master.numel())
                if state
                else torch.zeros_like(piece.master, dtype=self._moments_dtype)
                for kind in _MOMENTS
            }
            yield Fragment(piece.name, piece.start, {"master": piece.master, **moments})

    def load(self, read: ReadFragment, optimizer_step: int) -> None:
        """Replace weights, master weights and moments.

        Args:
            read: source of logical tensors.
            optimizer_step: Adam's update count of that state.
        """
        for partition in self._partitions:
            # A step tensor of its own for every partition: AdamW increments each in place.
            self._zero.optimizer.state[partition] = {
                "step": torch.tensor(float(optimizer_step), device=partition.device),
                "exp_avg": torch.zeros_like(partition.data, dtype=self._moments_dtype),
                "exp_avg_sq": torch.zeros_like(partition.data, dtype=self._moments_dtype),
            }
        with torch.no_grad():
            for piece in self._pieces():
                state = self._adam_state(piece.partition)
                stop = piece.start + piece.master.numel()
                for kind in FRAGMENT_KINDS:
                    in_state = kind != "master"
                    target = state[kind].narrow(0, piece.offset, piece.master.numel()) if in_state else piece.master
                    target.copy_(read(piece.name, kind, piece.start, stop))
            self._publish_masters()

    @property
    @abstractmethod
    def _partitions(self) -> list[torch.Tensor]:
        """Flat fp32 partitions of this rank, one per optimizer group; the keys of Adam's state."""

    @abstractmethod
    def _pieces(self) -> Iterator[_Piece]:
        """Everything this rank owns; over all ranks every element exactly once."""

    @abstractmethod
    def _publish_masters(self) -> None:
        """Bring the weights that the model computes with up to the master weights."""

    def _adam_state(self, group: int) -> dict[str, torch.Tensor]:
        return self._zero.optimizer.state.get(self._partitions[group], {})


class PartitionedOptimizerState(ZeroState):
    """State under ZeRO-1 and ZeRO-2: every rank has all weights and a part of the optimizer."""

    @property
    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _pieces(self) -> Iterator[_Piece]:
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            yield _Piece(
                name,
                self._expert_offsets.get(name, 0) + mapping.lp_fragment_address.start,
                mapping.param_group_index,
                mapping.hp_fragment_address.start,
                mapping.hp_fragment.data,
            )

    def _publish_masters(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()
        self._zero.update_lp_params()


class PartitionedParameterState(ZeroState):
    """State under ZeRO-3: every rank has a part of each parameter."""

    @property
    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _pieces(self) -> Iterator[_Piece]:
        for name, parameter in self._parameters.items():
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * size  # type: ignore[attr-defined]
            # The last ranks' parts end in padding, or are nothing else.
            numel = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if numel > 0:
                master = self._partitions[group].data.narrow(0, offset, numel)
                yield _Piece(name, self._expert_offsets.get(name, 0) + start, group, offset, master)

    def _publish_masters(self) -> None:
        for group in range(len(self._partitions)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        gathered = self._zero.persistent_parameters
        if gathered:
            # Small parameters are kept whole on every rank: their copies are as old as the model.
            gathered[0].partition(gathered)
            gathered[0].all_gather(gathered)
