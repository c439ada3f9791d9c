"""What the train loop and the checkpoint layer know of an engine; no DeepSpeed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.generate.sampling import Continuation, Sampling
from qwen3next_train.held_elements import Runs

FragmentKind = Literal["master", "exp_avg", "exp_avg_sq"]
FRAGMENT_KINDS: tuple[FragmentKind, ...] = ("master", "exp_avg", "exp_avg_sq")

ReadFragment = Callable[[str, FragmentKind, int, int], torch.Tensor]
"""``read(name, kind, start, stop)``: fp32 elements ``[start, stop)`` of the flattened logical tensor."""


@dataclass(frozen=True)
class Fragment:
    """The piece of one parameter's training state that this rank owns.

    The fragments of all ranks tile every logical tensor (all experts stacked) exactly once, at any world
    size, expert- and tensor-parallel size and ZeRO stage, which is what lets a checkpoint be loaded at any other.

    Args:
        name: logical parameter name (``parameters``).
        runs: where its elements are in the flattened logical tensor.
        tensors: ``[numel]`` views of the fp32 master weight and of the Adam moments, in the dtype they are kept in.
    """

    name: str
    runs: Runs
    tensors: dict[FragmentKind, torch.Tensor]

    @property
    def numel(self) -> int:
        """Number of elements of each tensor."""
        return self.runs.numel


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole global batch of one step, known before its first forward pass.

    Args:
        num_targets: real labels by prediction depth (``batch.PackedBatch.num_targets``), over all ranks.
        num_tokens: tokens of all rows.
        sum_squared_lengths: sum of the squared lengths of all document pieces.
        num_micro_batches: micro-batches of all ranks.
    """

    num_targets: tuple[int, ...]
    num_tokens: int
    sum_squared_lengths: int
    num_micro_batches: int

    @classmethod
    def over_ranks(
        cls, batches: Sequence[PackedBatch], sum_over_ranks: Callable[[Sequence[int]], list[int]]
    ) -> StepTotals:
        """Count this rank's micro-batches and add up the ranks' counts (``ControlGroup.sum_ints``)."""
        counts = [[*batch.num_targets, batch.num_tokens, batch.sum_squared_lengths, 1] for batch in batches]
        sums = sum_over_ranks([sum(column) for column in zip(*counts, strict=True)])
        *targets, tokens, squared, micro_batches = sums
        return cls(tuple(targets), tokens, squared, micro_batches)


class Report(Enum):
    """How much of a step's metrics to reduce and copy to the host."""

    NONE = 0
    SUMMARY = 1
    LAYERS = 2


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step produced, the same on all ranks.

    Args:
        metrics: values by metric name (``loss/lm``, ``optim/grad_norm``, ``moe/...``); empty when no
            report was asked for.
        skipped: the update was left out because a gradient was not finite.
    """

    metrics: dict[str, float]
    skipped: bool


def nothing() -> None:
    """What there is to do before an update where nobody is reading the state."""


class Engine(Protocol):
    """Owner of model, optimizer and their sharding."""

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        *,
        totals: StepTotals,
        lr: float,
        report: Report,
        before_update: Callable[[], None] = nothing,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer update.

        ``before_update`` is called before anything that :meth:`fragments` gives is changed.
        """

    def eval_loss(self, batches: Sequence[PackedBatch]) -> tuple[float, int]:
        """Mean next-token loss in nats over all ranks' ``batches`` and the number of targets."""

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        end_token_id: int | None,
        max_batch_tokens: int,
    ) -> list[Continuation]:
        """See ``generate.decode``; behind a training step, on every rank with the same arguments and result.

        Under ZeRO-3 it is the first training step that finds out which weights a module reads of another.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state."""

    def load_state(self, read: ReadFragment, optimizer_step: int) -> None:
        """Fill weights, master weights and moments from a checkpoint of any layout."""
