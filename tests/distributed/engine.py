"""The engine as training builds it, on the ranks of a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch.distributed as dist

from qwen3next_train.config.schema import Config
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.parallel.process_groups import ProcessContext

if TYPE_CHECKING:
    from qwen3next_train.engine.step_clock import StepClock
    from qwen3next_train.engine.zero_engine import ZeroEngine


def build_engine(config: Config, context: ProcessContext, clock: StepClock | None = None) -> ZeroEngine:
    """An engine with new weights, and with the process groups of those before it."""
    # DeepSpeed chooses its accelerator when it is first imported: the one that the context has decided on.
    from qwen3next_train.engine.zero_engine import ZeroEngine

    topology = context.topology(config.parallel)
    with _GROUPS.used_again():
        return ZeroEngine(
            config,
            topology=topology,
            kernels=select_kernels(config.kernels, context.device),
            device=context.device,
            num_micro_batches=config.run.global_batch_size
            // config.run.micro_batch_size
            // topology.data_parallel_size,
            clock=clock,
        )


class _Groups:
    """Process groups by their ranks, for one engine after the other.

    Gloo has three threads for each group, one of which wakes a hundred times a second, as long as the process lives:
    those of a hundred engines would take a tenth of a core in every rank. An engine that forms several groups of the
    same ranks gets as many.
    """

    def __init__(self) -> None:
        self._world: dist.ProcessGroup | None = None
        self._formed: dict[tuple[int, ...], list[dist.ProcessGroup]] = {}

    @contextmanager
    def used_again(self) -> Iterator[None]:
        if self._world is not dist.group.WORLD:
            self._world = dist.group.WORLD
            self._formed.clear()
        form, taken = dist.new_group, Counter[tuple[int, ...]]()

        def group_of(ranks: Iterable[int], *, timeout: timedelta | None = None) -> dist.ProcessGroup:
            key = tuple(ranks)
            formed = self._formed.setdefault(key, [])
            if taken[key] == len(formed):
                formed.append(form(list(key), timeout=timeout))
            taken[key] += 1
            return formed[taken[key] - 1]

        with patch.object(dist, "new_group", group_of):
            yield


_GROUPS = _Groups()
