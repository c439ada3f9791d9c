"""Where documents begin and end in a flattened batch, and the index tensors the kernels derive from it.

Built once per micro-batch and shared by all layers, so that each derived tensor is computed once and no
kernel asks the device for a length. Letters: T tokens, D documents, S slots of a padded layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch

_Derived = TypeVar("_Derived")


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """Documents cut into chunks of equal size, the last chunk of each padded at its front.

    At the front, so that a chunk's last slot always holds a token: decays "to the chunk's end" are then decays
    to a token, and the decay from that token to the end is the constant 1.

    Chunks are ordered by their index inside the document, and within one index by descending document
    length, so that step i of a scan over chunks works on one contiguous block of chunks.

    Args:
        size: tokens per chunk, C.
        slots_T: int64 ``[T]``, slot of each token in the padded ``[num_chunks * C]`` layout.
        chunks_per_step: number of chunks with index i, for each i; never increasing.
        document_order: int64 ``[D]``, documents by descending number of chunks.
    """

    size: int
    slots_T: torch.Tensor
    chunks_per_step: tuple[int, ...]
    document_order: torch.Tensor

    @property
    def num_chunks(self) -> int:
        """All chunks of the batch."""
        return sum(self.chunks_per_step)


@dataclass(frozen=True, eq=False)
class BinLayout:
    """Consecutive documents packed into bins as long as the longest document, for batched attention.

    Args:
        length: slots per bin, L.
        num_bins: number of bins, B.
        slots_T: int64 ``[T]``, slot of each token in the padded ``[B * L]`` layout.
        visible_BLL: bool ``[B, 1, L, L]``, may slot i see slot j; None when every bin is one whole document.
    """

    length: int
    num_bins: int
    slots_T: torch.Tensor
    visible_BLL: torch.Tensor | None


@dataclass(eq=False)
class VarlenMetadata:
    """The documents of a flattened batch, and what kernels have derived from them so far.

    Args:
        cu_seqlens: int32 ``[D + 1]`` document starts and T, strictly increasing, on the activations' device.
        cu_seqlens_cpu: the same on the host.
    """

    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    _cache: dict[tuple[str, int], object] = field(default_factory=dict, repr=False)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> VarlenMetadata:
        """Build from document lengths, each at least 1."""
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        return cls(ends.to(device), ends)

    @property
    def num_documents(self) -> int:
        """D."""
        return self.cu_seqlens_cpu.numel() - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.cu_seqlens_cpu[-1])

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return self.derived(("longest", 0), lambda: int(self._lengths().max()))

    @property
    def common_length(self) -> int | None:
        """Tokens of every document if all have the same number, else None."""
        return self.max_length if self.max_length * self.num_documents == self.num_tokens else None

    def chunks(self, size: int) -> ChunkLayout:
        """Documents cut into chunks of ``size`` tokens."""
        return self.derived(("chunks", size), lambda: self._build_chunks(size))

    def spaced_slots(self, gap: int) -> torch.Tensor:
        """Int64 ``[T]``, slot of each token when ``gap`` empty slots stand before every document."""
        return self.derived(("spaced", gap), lambda: self._build_spaced(gap))

    def extended(self, gap: int) -> VarlenMetadata:
        """The documents with ``gap`` tokens more before each; :meth:`spaced_slots` says where the others are then."""
        return self.derived(("extended", gap), lambda: self._build_extended(gap))

    def starts(self) -> torch.Tensor:
        """Int32 ``[T]``, index of the first token of each token's document."""
        return self.derived(("starts", 0), self._build_starts)

    def chunk_indices(self, size: int) -> torch.Tensor:
        """Int32 ``[M, 2]``, document and index inside it of each chunk of ``size`` tokens, in order of the tokens."""
        return self.derived(("chunk_indices", size), lambda: self._build_chunk_indices(size))

    def bins(self) -> BinLayout:
        """Documents packed into bins for batched attention."""
        return self.derived(("bins", 0), self._build_bins)

    def derived(self, key: tuple[str, int], build: Callable[[], _Derived]) -> _Derived:
        """What ``build`` returns, computed by the first who asks for ``key``."""
        if key not in self._cache:
            self._cache[key] = build()
        return cast(_Derived, self._cache[key])

    def _lengths(self) -> torch.Tensor:
        return self.cu_seqlens_cpu.long().diff()

    def _document_cpu(self) -> torch.Tensor:
        return torch.repeat_interleave(torch.arange(self.num_documents), self._lengths())

    def _position_cpu(self) -> torch.Tensor:
        starts = self.cu_seqlens_cpu[:-1].long()
        return torch.arange(self.num_tokens) - torch.repeat_interleave(starts, self._lengths())

    def _build_chunks(self, size: int) -> ChunkLayout:
        lengths_D = self._lengths()
        chunks_D = (lengths_D + size - 1) // size
        order = torch.argsort(chunks_D, descending=True, stable=True)
        rank_D = torch.empty_like(order)
        rank_D[order] = torch.arange(order.numel())
        per_step = tuple(int((chunks_D > step).sum()) for step in range(int(chunks_D.max())))
        offsets = torch.tensor([0, *per_step]).cumsum(0)
        document_T, position_T = self._document_cpu(), self._position_cpu()
        chunk_T = offsets[position_T // size] + rank_D[document_T]
        is_last_T = position_T // size == chunks_D[document_T] - 1
        padding_T = (chunks_D * size - lengths_D)[document_T] * is_last_T
        slots_T = chunk_T * size + position_T % size + padding_T
        device = self.cu_seqlens.device
        return ChunkLayout(size, slots_T.to(device), per_step, order.to(device))

    def _build_spaced(self, gap: int) -> torch.Tensor:
        slots_T = torch.arange(self.num_tokens) + gap * (self._document_cpu() + 1)
        return slots_T.to(self.cu_seqlens.device)

    def _build_extended(self, gap: int) -> VarlenMetadata:
        added, added_cpu = (
            gap * torch.arange(self.num_documents + 1, dtype=torch.int32, device=ends.device)
            for ends in (self.cu_seqlens, self.cu_seqlens_cpu)
        )
        return VarlenMetadata(self.cu_seqlens + added, self.cu_seqlens_cpu + added_cpu)

    def _build_starts(self) -> torch.Tensor:
        # On the device, as are the chunk indices: a copy from the host would wait for it.
        tokens_T = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        document_T = torch.searchsorted(self.cu_seqlens, tokens_T, right=True) - 1
        return self.cu_seqlens[document_T]

    def _build_chunk_indices(self, size: int) -> torch.Tensor:
        num_chunks = int(((self._lengths() + size - 1) // size).sum())
        chunks_D = (self.cu_seqlens.diff() + size - 1) // size
        ends_D = chunks_D.cumsum(0, dtype=torch.int32)
        chunks_M = torch.arange(num_chunks, dtype=torch.int32, device=self.cu_seqlens.device)
        document_M = torch.searchsorted(ends_D, chunks_M, right=True)
        inside_M = chunks_M - (ends_D - chunks_D)[document_M]
        return torch.stack((document_M.to(torch.int32), inside_M), dim=1)

    def _build_bins(self) -> BinLayout:
        length = self.max_length
        bin_D: list[int] = []
        offset_D: list[int] = []
        fill = length
        for document_length in self._lengths().tolist():
            if fill + document_length > length:
                bin_D.append(bin_D[-1] + 1 if bin_D else 0)
                fill = 0
            else:
                bin_D.append(bin_D[-1])
            offset_D.append(fill)
            fill += document_length
        num_bins = bin_D[-1] + 1
        starts = torch.tensor(bin_D) * length + torch.tensor(offset_D)
        document_T = self._document_cpu()
        slots_T = starts[document_T] + self._position_cpu()
        device = self.cu_seqlens.device
        if num_bins * length == self.num_tokens and num_bins == self.num_documents:
            return BinLayout(length, num_bins, slots_T.to(device), None)
        owner = torch.full((num_bins * length,), -1)
        owner[slots_T] = document_T
        owner = owner.to(device).view(num_bins, length)
        # Padding slots see themselves (same owner -1), so no softmax row is empty.
        visible = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril_().unsqueeze(1)
        return BinLayout(length, num_bins, slots_T.to(device), visible)


class _ScatterRows(torch.autograd.Function):
    """Rows to unique slots of a zero-filled layout; backward is the plain gather."""

    @staticmethod
    def forward(ctx, rows, slots, num_slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        return rows.new_zeros(num_slots, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _GatherRows(torch.autograd.Function):
    """Rows from unique slots; backward is a plain scatter, without the atomics of ``index_add``."""

    @staticmethod
    def forward(ctx, padded, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        ctx.num_slots = padded.shape[0]
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slots, grad), None


def scatter_rows(rows: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """``[T, ...]`` to zero-filled ``[num_slots, ...]`` with row t at ``slots[t]``; slots are unique."""
    return _ScatterRows.apply(rows, slots, num_slots)


def gather_rows(padded: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``[num_slots, ...]`` to ``[T, ...]`` with row t from ``slots[t]``; slots are unique."""
    return _GatherRows.apply(padded, slots)
