"""Reading and writing the training state inside DeepSpeed's ZeRO optimizers, by logical parameter name.

ZeRO flattens each optimizer group and gives every rank a partition of it. Under stages 1 and 2 the group as a
whole is cut, under stage 3 each of its parameters. Where a parameter's piece lies is DeepSpeed's own record
(``_hp_mapping``; ``grad_position``). These are private attributes, which is why the version is pinned and this
file has its own tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment, FragmentKind, ReadFragment
from qwen3next_train.held_elements import Runs, runs_of_range

_MOMENTS: tuple[FragmentKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """What a rank owns of one parameter.

    Args:
        name: logical parameter name.
        start: first element in what the rank's module holds of the parameter, flattened.
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
        held: which elements of each logical tensor those of this rank's parameters are.
        moments_dtype: what AdamW keeps its moments in.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        held: Mapping[str, Sequence[Runs]],
        *,
        moments_dtype: torch.dtype,
    ) -> None:
        self._zero = optimizer
        self._moments_dtype = moments_dtype
        self._parameters = parameters
        self._held = held

    def fragments(self) -> Iterator[Fragment]:
        """The state this rank owns; moments are zero before the first update."""
        for piece in self._pieces():
            state = self._adam_state(piece.partition)
            for at, runs in self._runs(piece):
                master = piece.master.narrow(0, at, runs.numel)
                moments = {
                    kind: state[kind].narrow(0, piece.offset + at, runs.numel)
                    if state
                    else torch.zeros_like(master, dtype=self._moments_dtype)
                    for kind in _MOMENTS
                }
                yield Fragment(piece.name, runs, {"master": master, **moments})

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
                for (at, runs), kind in product(self._runs(piece), FRAGMENT_KINDS):
                    source, first = (piece.master, 0) if kind == "master" else (state[kind], piece.offset)
                    target = source.narrow(0, first + at, runs.numel).view(runs.count, runs.length)
                    # Of runs with gaps what lies between them is read too: other ranks' heads.
                    whole = read(piece.name, kind, runs.start, runs.stop)
                    values = replace(runs, start=0).of(whole)
                    # To another dtype the source's device converts: not the host, which has one core for it.
                    target.copy_(values if values.dtype == target.dtype else values.to(target.device))
            self._publish_masters()

    def _runs(self, piece: _Piece) -> Iterator[tuple[int, Runs]]:
        """Where in a piece runs begin, and where these are in the logical tensor."""
        return runs_of_range(self._held[piece.name], piece.start, piece.start + piece.master.numel())

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
                mapping.lp_fragment_address.start,
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
                yield _Piece(name, start, group, offset, master)

    def _publish_masters(self) -> None:
        for group in range(len(self._partitions)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        gathered = self._zero.persistent_parameters
        if gathered:
            # Small parameters are kept whole on every rank: their copies are as old as the model.
            gathered[0].partition(gathered)
            gathered[0].all_gather(gathered)
