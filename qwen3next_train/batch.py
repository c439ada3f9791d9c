"""The contract between data and model: one micro-batch of packed rows, flattened over rows.

Letters: T tokens of the micro-batch (``num_rows * sequence_length``), D documents (pieces) in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

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
    """

    tokens: npt.NDArray[np.int64]
    boundaries: npt.NDArray[np.int64]
    ends_inside_document: bool


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Tensors live on one device, ``cu_seqlens_cpu`` and the counts on the host.

    A row's end is always a document's end, so no mixer needs to know about rows.

    Args:
        input_ids_T: int64 ``[T]``.
        labels_T: int64 ``[T]``, the next token of the same document, or :data:`IGNORE_INDEX`.
        positions_T: int64 ``[T]``, position inside the document piece, for RoPE.
        cu_seqlens: int32 ``[D + 1]``, starts of the document pieces and T, on the tensors' device.
        cu_seqlens_cpu: the same on the host, so that no kernel has to ask the device for it.
        num_rows: rows in the batch; T is a multiple of it.
        num_targets: number of labels that are real, by prediction depth: ``[0]`` next token, ``[k]`` the
            k-th MTP depth (the token k further on in the same document).
        sum_squared_lengths: sum of the squared lengths of the document pieces (attention's FLOPs).
    """

    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    num_rows: int
    num_targets: tuple[int, ...]
    sum_squared_lengths: int

    @classmethod
    def from_rows(cls, rows: Sequence[PackedRow], *, mtp_depths: int) -> PackedBatch:
        """Flatten rows of equal length into one micro-batch on the host.

        Args:
            rows: at least one row, all with the same number of tokens.
            mtp_depths: MTP depths to count targets for.
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
        return cls(
            input_ids_T=torch.from_numpy(inputs),
            labels_T=torch.from_numpy(labels),
            positions_T=torch.from_numpy(positions),
            cu_seqlens=cu_seqlens_cpu,
            cu_seqlens_cpu=cu_seqlens_cpu,
            num_rows=len(rows),
            num_targets=counts,
            sum_squared_lengths=int((lengths**2).sum()),
        )

    @property
    def num_tokens(self) -> int:
        """T, all tokens of the batch."""
        return self.input_ids_T.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the tensors to ``device`` without waiting for the copy."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids_T=_copy(self.input_ids_T, device),
            labels_T=_copy(self.labels_T, device),
            positions_T=_copy(self.positions_T, device),
            cu_seqlens=_copy(self.cu_seqlens_cpu, device),
        )


def _ends_with_target(row: PackedRow) -> npt.NDArray[np.bool_]:
    """For each document piece of the row: does its last position have a target?"""
    has_next = np.zeros(len(row.boundaries) - 1, dtype=np.bool_)
    has_next[-1] = row.ends_inside_document
    return has_next


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
