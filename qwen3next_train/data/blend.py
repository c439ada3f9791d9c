"""Which source sample ``i`` comes from: a pure function of (seed, weights, i) in exact integer arithmetic.

Samples are dealt in blocks of B. Before block ``b``, source ``s`` has received ``floor(b * B * w_s)`` samples, and
the heaviest source takes what is left. No source's count can fall: each other source's share of one block is
less than ``B * w_s + 1``, so at least ``B * w_max - (n - 1)`` samples remain for the heaviest, which is positive
because ``w_max >= 1 / n`` and ``B >= n * n``. Inside a block a keyed permutation shuffles the slots, and each source's
samples are numbered in the order in which they come, so no sample of a source is skipped, repeated or overtaken.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.permutation import derive_key, permutation_of_power

MIN_BLOCK_BITS = 12


class Blend:
    """Deals samples to weighted sources.

    Args:
        weights: relative shares, each finite and positive; read as the decimal numbers they print as, so that
            ``[0.1, 0.2]`` means exactly one to two.
        seed: selects the order inside the blocks.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        assert weights
        assert all(weight > 0 for weight in weights)
        exact = [Fraction(repr(weight)) for weight in weights]
        total = sum(exact, Fraction(0))
        self._shares = [weight / total for weight in exact]
        self._heaviest = self._shares.index(max(self._shares))
        self._block_bits = max(MIN_BLOCK_BITS, (len(weights) ** 2 - 1).bit_length())
        self._seed = seed
        self._block: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    @property
    def block_size(self) -> int:
        """Samples per block; at every multiple of it each source but the heaviest has its share rounded down."""
        return 1 << self._block_bits

    def locate(self, sample_index: int) -> tuple[int, int]:
        """Return ``(source, index in source)`` of a sample; amortised O(1), O(block) when a new block is entered."""
        if len(self._shares) == 1:
            return 0, sample_index
        number, slot = divmod(sample_index, self.block_size)
        block = self._block
        if block is None or block[0] != number:
            block = self._block = (number, *self._deal(number))
        return int(block[1][slot]), int(block[2][slot])

    def counts_before_block(self, number: int) -> list[int]:
        """Samples each source has received before block ``number``."""
        dealt = number * self.block_size
        counts = [dealt * share.numerator // share.denominator for share in self._shares]
        counts[self._heaviest] += dealt - sum(counts)
        return counts

    def counts_before(self, sample_index: int) -> list[int]:
        """Samples each source has received before a sample."""
        if len(self._shares) == 1:
            return [sample_index]
        number, slot = divmod(sample_index, self.block_size)
        sources, _ = self._deal(number)
        taken = np.bincount(sources[:slot], minlength=len(self._shares)).tolist()
        return [before + count for before, count in zip(self.counts_before_block(number), taken, strict=True)]

    def _deal(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source and index in source of every slot of a block: two int64 ``[block_size]``."""
        first, last = self.counts_before_block(number), self.counts_before_block(number + 1)
        ends = np.cumsum([after - before for before, after in zip(first, last, strict=True)])
        tickets = permutation_of_power(self._block_bits, derive_key(self._seed, "blend", number))
        sources = np.searchsorted(ends, tickets, side="right").astype(np.int64)
        indices = np.empty_like(sources)
        for source, count in enumerate(first):
            slots = np.flatnonzero(sources == source)
            indices[slots] = count + np.arange(len(slots))
        return sources, indices
