"""Reading and writing the training state inside DeepSpeed's ZeRO-1/2 optimizer, by logical parameter name.

ZeRO flattens each optimizer group and gives every rank one contiguous partition of it; the map from a
parameter to its piece of the partition (``_hp_mapping``) is DeepSpeed's. These are private attributes,
which is why the version is pinned and this file has its own tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment, FragmentKind, ReadFragment

_MOMENTS: tuple[FragmentKind, ...] = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """Training state of one rank under ZeRO-1 or ZeRO-2.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer around ``torch.optim.AdamW``.
        parameters: the engine module's parameters by logical name.
        expert_offsets: for expert parameters, the flat offset of this rank's first expert in the logical
            tensor; 0 for every other name is implied.
    """

    def __init__(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], expert_offsets: Mapping[str, int]
    ) -> None:
        self._zero = optimizer
        self._parameters = parameters
        self._expert_offsets = expert_offsets

    def fragments(self) -> Iterator[Fragment]:
        """Views of the state this rank owns; moments are zero before the first update."""
        for name, start, group, offset, master in self._pieces():
            state = self._adam_state(group)
            moments = {
                kind: state[kind].narrow(0, offset, master.numel()) if state else torch.zeros_like(master)
                for kind in _MOMENTS
            }
            yield Fragment(name, start, {"master": master, **moments})

    def load(self, read: ReadFragment, optimizer_step: int) -> None:
        """Replace weights, master weights and moments.

        Args:
            read: source of logical tensors.
            optimizer_step: Adam's update count of that state.
        """
        for partition in self._partitions:
            # A step tensor of its own for every partition: AdamW increments each in place.
            self._zero.optimizer.state[partition] = {
                "step": torch.tensor(float(optimizer_step), device=self._step_device(partition)),
                "exp_avg": torch.zeros_like(partition.data),
                "exp_avg_sq": torch.zeros_like(partition.data),
            }
        with torch.no_grad():
            for name, start, group, offset, master in self._pieces():
                state = self._adam_state(group)
                for kind in FRAGMENT_KINDS:
                    target = master if kind == "master" else state[kind].narrow(0, offset, master.numel())
                    target.copy_(read(name, kind, start, start + master.numel()))
        self._zero._lazy_init_hp_params_optimizer_state()
        self._zero.update_lp_params()

    @property
    def _partitions(self) -> list[torch.Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _adam_state(self, group: int) -> dict[str, torch.Tensor]:
        return self._zero.optimizer.state.get(self._partitions[group], {})

    def _step_device(self, partition: torch.Tensor) -> torch.device:
        # Fused AdamW keeps its step on the parameter's device, the plain one on the host.
        fused = self._zero.optimizer.param_groups[0].get("fused")
        return partition.device if fused else torch.device("cpu")

    def _pieces(self) -> Iterator[tuple[str, int, int, int, torch.Tensor]]:
        """``(name, logical start, group, offset in the partition, master piece)`` of each owned piece."""
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            start = self._expert_offsets.get(name, 0) + mapping.lp_fragment_address.start
            yield (
                name,
                start,
                mapping.param_group_index,
                mapping.hp_fragment_address.start,
                mapping.hp_fragment.data,
            )
