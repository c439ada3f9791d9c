"""How the rows of a micro-batch are cut into equal contiguous slices over the ranks of a context group. No torch.

Slice p of every row is rank p's: positions ``[p L, (p + 1) L)`` of each, L = S / P. The convolution of a Gated DeltaNet
layer also reads the ``halo`` positions before a slice, so those layers work on the *extended* slice, for each row the
halo and then the slice. Row 0 of 8 tokens, with documents ``a`` and ``b``, over two ranks, halo 3::

    row                   a a a a a a b b
    slices                a a a a|a a b b
    rank 1, extended      a a a:a a b b         positions 1 to 7
      convolved as        [a a a a a] [b b]     documents as they are
      scanned as          [a a a] [a a] [b b]   the halo by itself, its outputs are dropped
      first piece         1, which continues a document: it takes the state of rank 0
      last piece          2, whose end is the state that rank 1 would pass on

With tensor parallelism a slice is that of a tensor group, whose mixers see all of it; of everything else each of its
ranks has an equal *share* of the slice.

Letters: S tokens of a row, P slices, L tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.topology import Topology

CumulatedLengths = npt.NDArray[np.int32]
"""``[pieces + 1]``: starts of pieces, and the end."""


@dataclass(frozen=True)
class RowSlice:
    """Which slice of every row a rank has, and which share of the slice.

    Args:
        index: p, from 0.
        count: P.
        halo: positions before a slice that its first tokens depend on, at most L.
        share: which share of the slice is this rank's, from 0.
        num_shares: equal shares of a slice.
    """

    index: int
    count: int
    halo: int
    share: int = 0
    num_shares: int = 1

    @classmethod
    def of(cls, topology: Topology, model: ModelConfig) -> RowSlice:
        """That of a rank, with the halo of a model's convolution."""
        return cls(
            topology.context_parallel_rank,
            topology.context_parallel_size,
            halo=model.linear_conv_kernel_dim - 1,
            share=topology.tensor_parallel_rank,
            num_shares=topology.tensor_parallel_size,
        )

    @property
    def own(self) -> RowSlice:
        """The share as a slice of its own."""
        return RowSlice(self.index * self.num_shares + self.share, self.count * self.num_shares, self.halo)


WHOLE_ROW = RowSlice(0, 1, halo=0)
"""The slice of a rank that has its rows to itself."""


@dataclass(frozen=True)
class SlicePlan:
    """The cuts of one micro-batch as one rank sees them, made once and on the host.

    Args:
        part: this rank's slice.
        num_rows: rows of the micro-batch.
        whole: documents of the uncut micro-batch.
        pieces: pieces of documents in the slices of this rank, row after row.
        convolved: documents of the extended slices as the convolution sees them.
        scanned: pieces of the extended slices as the delta rule sees them: a halo is a piece of its own.
        first: by row, the piece of ``scanned`` with which the slice begins.
        last: by row, the range of extended positions of the piece with which the slice ends.
        continues: ``[rank][row]``, whether the slice of a rank begins inside a document: it takes the state that
            arrives.
        passes: ``[rank][row]``, whether a slice lies in one document: the state that arrives reaches its end.
    """

    part: RowSlice
    num_rows: int
    whole: CumulatedLengths
    pieces: CumulatedLengths
    convolved: CumulatedLengths
    scanned: CumulatedLengths
    first: tuple[int, ...]
    last: tuple[tuple[int, int], ...]
    continues: tuple[tuple[bool, ...], ...]
    passes: tuple[tuple[bool, ...], ...]

    @cached_property
    def first_ranges(self) -> tuple[tuple[int, int], ...]:
        """By row, the range of extended positions of the piece with which the slice begins."""
        return tuple((int(self.scanned[piece]), int(self.scanned[piece + 1])) for piece in self.first)

    @property
    def last_pieces(self) -> tuple[int, ...]:
        """By row, the piece of ``scanned`` with which the slice ends: before the next row's halo there is nothing."""
        return (*(piece - 2 for piece in self.first[1:]), len(self.scanned) - 2)


def plan_slices(cu_seqlens: npt.NDArray[np.integer], *, num_rows: int, part: RowSlice) -> SlicePlan:
    """Plan one rank's slices.

    Args:
        cu_seqlens: ``[D + 1]`` starts of the documents of the uncut micro-batch, and its end; a row begins a document.
        num_rows: rows, each as long as the others and a multiple of P.
        part: the rank's slice.
    """
    length = int(cu_seqlens[-1]) // num_rows
    size = length // part.count
    assert size * part.count * num_rows == cu_seqlens[-1], "rows of another length, or not a multiple of the slices"
    assert part.halo <= size, "a halo that reaches beyond the slice before"
    starts = [cu_seqlens[:-1][cu_seqlens[:-1] // length == row] - row * length for row in range(num_rows)]
    begin, extended = part.index * size, size + part.halo
    pieces: list[int] = []
    convolved: list[int] = []
    scanned: list[int] = []
    first, last = [], []
    for row, of_row in enumerate(starts):
        inner = of_row[(of_row > begin) & (of_row < begin + size)] - begin
        seen = of_row[(of_row > begin - part.halo) & (of_row < begin + size)] - begin
        pieces += [row * size, *(row * size + inner).tolist()]
        at = row * extended + part.halo
        convolved += [row * extended, *(at + seen).tolist()]
        scanned.append(row * extended)
        first.append(len(scanned))
        scanned += [at, *(at + inner).tolist()]
        last.append((scanned[-1], (row + 1) * extended))
    return SlicePlan(
        part=part,
        num_rows=num_rows,
        whole=_cumulated(cu_seqlens.tolist()),
        pieces=_cumulated([*pieces, num_rows * size]),
        convolved=_cumulated([*convolved, num_rows * extended]),
        scanned=_cumulated([*scanned, num_rows * extended]),
        first=tuple(first),
        last=tuple(last),
        continues=tuple(tuple(not _any_in(of_row, at, at + 1) for of_row in starts) for at in range(0, length, size)),
        passes=tuple(
            tuple(not _any_in(of_row, at + 1, at + size) for of_row in starts) for at in range(0, length, size)
        ),
    )


def squares_of_slice(cu_seqlens: npt.NDArray[np.integer], *, num_rows: int, part: RowSlice) -> int:
    """A rank's share of the documents' squared lengths: ``2 i + 1`` for position i of a document.

    The ranks' shares add up to the whole, and each counts the keys that its queries see.
    """
    length = int(cu_seqlens[-1]) // num_rows
    size = length // part.count
    # At once: a row may be hundreds of thousands of documents. Squares of a long one are beyond 32 bits.
    starts, ends = cu_seqlens[:-1].astype(np.int64), cu_seqlens[1:].astype(np.int64)
    begins = starts // length * length + part.index * size
    inside_from = np.maximum(starts, begins) - starts
    inside_to = np.maximum(np.minimum(ends, begins + size) - starts, inside_from)
    return int((inside_to**2 - inside_from**2).sum())


def _any_in(starts: npt.NDArray[np.integer], first: int, stop: int) -> bool:
    return bool(((starts >= first) & (starts < stop)).any())


def _cumulated(starts: Sequence[int]) -> CumulatedLengths:
    return np.array(starts, dtype=np.int32)
