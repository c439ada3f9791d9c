"""The contract between data and model: one micro-batch of packed rows, flattened over rows.

With context parallelism a rank has an equal slice of every row (``row_slices``); targets and positions are those of the
uncut row.

With tensor parallelism the mixers of a rank see the slices of its tensor group, of which each rank has a share.

Letters: T tokens of the micro-batch on this rank (of all of its rows, of their slices or shares of them), U tokens that
its mixers see (T, or with tensor parallelism those of its tensor group), D documents (pieces) among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from qwen3next_train.row_slices import RowSlice, SlicePlan, plan_slices, squares_of_slice

IGNORE_INDEX = -100
"""Label of a position that has no target (the last token of a document)."""


@dataclass(frozen=True)
class PackedRow:
    """One training row before batching.

    Args:
        tokens: int array ``[S + 1]``; inputs are ``tokens[:S]``, next tokens ``tokens[1:]``.
        boundaries: int array ``[D + 1]``, document starts inside the row and the row's end:
            ``boundaries[0] == 0``, ``boundaries[-1] == S``, strictly increasing.
        ends_inside_document: the token after the row continues the row's last document, so the last
            position has a target.
        source: number of the training source that the row is from.
    """

    tokens: npt.NDArray[np.int64]
    boundaries: npt.NDArray[np.int64]
    ends_inside_document: bool
    source: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Tensors live on one device, ``cu_seqlens_cpu`` and the counts on the host.

    A row's end is always a document's end, so no mixer needs to know about rows.

    Args:
        input_ids_T: int64 ``[T]``.
        labels_T: int64 ``[T]``, the next token of the same document, or :data:`IGNORE_INDEX`.
        mtp_targets: by MTP depth from 1, int64 ``[T]``: the token one further on in the same document than at the depth
            before, or :data:`IGNORE_INDEX`.
        positions_T: int64 ``[T]``, position inside the document piece.
        positions_U: int64 ``[U]``, the same of all tokens that mixers see, for RoPE (with tensor parallelism more).
        cu_seqlens: int32 ``[D + 1]``, starts of the document pieces and U, on the tensors' device.
        cu_seqlens_cpu: the same on the host, so that no kernel has to ask the device for it.
        num_rows: rows in the batch, or slices of rows; T and U are multiples of it.
        num_targets: number of labels that are real, by prediction depth: ``[0]`` next token, ``[k]`` the
            k-th MTP depth (the token k further on in the same document).
        sum_squared_lengths: sum of the squared lengths of the document pieces (attention's FLOPs), or of it
            this rank's share.
        sources: of each row, or this rank's part of one, the number of the training source it is from.
        slices: how the rows that mixers see are cut, None for whole rows.
    """

    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    mtp_targets: tuple[torch.Tensor, ...]
    positions_T: torch.Tensor
    positions_U: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    num_rows: int
    num_targets: tuple[int, ...]
    sum_squared_lengths: int
    sources: tuple[int, ...]
    slices: BatchSlices | None = None

    @classmethod
    def from_rows(cls, rows: Sequence[PackedRow], *, mtp_depths: int) -> PackedBatch:
        """Flatten rows of equal length into one micro-batch on the host.

        Args:
            rows: at least one row, all with the same number of tokens.
            mtp_depths: MTP depths there are targets for.
        """
        length = len(rows[0].tokens) - 1
        assert all(len(row.tokens) == length + 1 for row in rows)
        inputs = np.concatenate([row.tokens[:length] for row in rows]).astype(np.int64)
        labels = np.concatenate([row.tokens[1:] for row in rows]).astype(np.int64)
        starts = [row.boundaries[:-1] + index * length for index, row in enumerate(rows)]
        cu_seqlens = np.concatenate([*starts, [length * len(rows)]]).astype(np.int64)
        lengths = np.diff(cu_seqlens)
        ends = np.concatenate([row.boundaries[1:] + index * length for index, row in enumerate(rows)])
        has_next = np.concatenate([_ends_with_target(row) for row in rows])
        labels[ends[~has_next] - 1] = IGNORE_INDEX
        targets = lengths - ~has_next
        counts = tuple(int(np.maximum(targets - depth, 0).sum()) for depth in range(mtp_depths + 1))
        positions = np.arange(length * len(rows)) - np.repeat(cu_seqlens[:-1], lengths)
        cu_seqlens_cpu = torch.from_numpy(cu_seqlens.astype(np.int32))
        targets_T, positions_T = torch.from_numpy(labels), torch.from_numpy(positions)
        return cls(
            input_ids_T=torch.from_numpy(inputs),
            labels_T=targets_T,
            mtp_targets=mtp_targets(targets_T, cu_seqlens_cpu, mtp_depths),
            positions_T=positions_T,
            positions_U=positions_T,
            cu_seqlens=cu_seqlens_cpu,
            cu_seqlens_cpu=cu_seqlens_cpu,
            num_rows=len(rows),
            num_targets=counts,
            sum_squared_lengths=int((lengths**2).sum()),
            sources=tuple(row.source for row in rows),
        )

    @property
    def num_tokens(self) -> int:
        """T, all tokens of the batch."""
        return self.input_ids_T.numel()

    def cut(self, part: RowSlice) -> PackedBatch:
        """One rank's part of whole rows on the host; the parts of all ranks have every token once.

        Args:
            part: of each row. One slice of one is the row, if it is not shared.
        """
        assert self.slices is None, "cut already"
        if part.own.count == 1:
            return self
        cu_seqlens = self.cu_seqlens_cpu.numpy()
        plan = plan_slices(cu_seqlens, num_rows=self.num_rows, part=part)

        def of(values_T: torch.Tensor, part: RowSlice) -> torch.Tensor:
            # A copy, or the whole row would stay as long as its slice does.
            return values_T.view(self.num_rows, part.count, -1)[:, part.index].flatten().clone()

        labels_T = of(self.labels_T, part.own)
        further = tuple(of(targets_T, part.own) for targets_T in self.mtp_targets)
        positions_T = of(self.positions_T, part.own)
        pieces = torch.from_numpy(plan.pieces)
        return PackedBatch(
            input_ids_T=of(self.input_ids_T, part.own),
            labels_T=labels_T,
            mtp_targets=further,
            positions_T=positions_T,
            positions_U=positions_T if part.num_shares == 1 else of(self.positions_T, part),
            cu_seqlens=pieces,
            cu_seqlens_cpu=pieces,
            num_rows=self.num_rows,
            num_targets=tuple(int((targets_T != IGNORE_INDEX).sum()) for targets_T in (labels_T, *further)),
            sum_squared_lengths=squares_of_slice(cu_seqlens, num_rows=self.num_rows, part=part.own),
            sources=self.sources,
            slices=BatchSlices.of(plan) if part.count > 1 else None,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the tensors to ``device`` without waiting for the copy."""
        if device.type == "cpu":
            return self
        positions_T = _copy(self.positions_T, device)
        return replace(
            self,
            input_ids_T=_copy(self.input_ids_T, device),
            labels_T=_copy(self.labels_T, device),
            mtp_targets=tuple(_copy(targets_T, device) for targets_T in self.mtp_targets),
            positions_T=positions_T,
            positions_U=positions_T if self.positions_U is self.positions_T else _copy(self.positions_U, device),
            cu_seqlens=_copy(self.cu_seqlens_cpu, device),
            slices=None if self.slices is None else self.slices.to(device),
        )


@dataclass(frozen=True)
class BatchSlices:
    """A plan of cuts, and what of it kernels read, as int32 ``[pieces + 1]``, on the batch's device.

    Args:
        plan: the cuts.
        whole: documents of the uncut micro-batch.
        convolved: documents of the extended slices.
        scanned: pieces of the extended slices.
        first: the slices' first pieces, one after the other.
        last: the slices' last pieces, likewise.
    """

    plan: SlicePlan
    whole: torch.Tensor
    convolved: torch.Tensor
    scanned: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, plan: SlicePlan) -> BatchSlices:
        """On the host."""
        ends = (_ends(plan.first_ranges), _ends(plan.last))
        return cls(plan, *map(torch.from_numpy, (plan.whole, plan.convolved, plan.scanned, *ends)))

    def to(self, device: torch.device) -> BatchSlices:
        """Copy without waiting."""
        if device.type == "cpu":
            return self
        host = (self.whole, self.convolved, self.scanned, self.first, self.last)
        return BatchSlices(self.plan, *(_copy(values, device) for values in host))


def _ends(ranges: Sequence[tuple[int, int]]) -> npt.NDArray[np.int32]:
    """Starts of the ranges laid one after the other, and the end."""
    return np.array([0, *(stop - start for start, stop in ranges)], dtype=np.int32).cumsum(dtype=np.int32)


def mtp_targets(labels_T: torch.Tensor, cu_seqlens: torch.Tensor, depths: int) -> tuple[torch.Tensor, ...]:
    """Targets of each MTP depth from 1: those of the depth before shifted by one inside every document.

    The last position of a document, which the shift leaves empty, is ignored.

    Args:
        labels_T: int64 ``[T]``, targets of depth 0, of whole rows.
        cu_seqlens: int32 ``[D + 1]``.
        depths: number of depths.
    """
    targets = [labels_T]
    for _ in range(depths):
        targets.append(targets[-1].roll(-1).index_fill_(0, cu_seqlens[1:].long() - 1, IGNORE_INDEX))
    return tuple(targets[1:])


def _ends_with_target(row: PackedRow) -> npt.NDArray[np.bool_]:
    """For each document piece of the row: does its last position have a target?"""
    has_next = np.zeros(len(row.boundaries) - 1, dtype=np.bool_)
    has_next[-1] = row.ends_inside_document
    return has_next


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
