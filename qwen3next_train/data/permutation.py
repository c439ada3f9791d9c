"""Keyed pseudo-random permutations of ``0..size-1`` that need no memory.

An unbalanced Feistel network over the smallest power of two that holds ``size``, with cycle walking (apply the
network again until the result falls below ``size``): Black and Rogaway, "Ciphers with arbitrary finite domains"
(CT-RSA 2002). Integer arithmetic only, so the order is the same on every machine and with every numpy version.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 6
_MASK64 = (1 << 64) - 1

Key = NewType("Key", tuple[int, ...])
"""One 64-bit integer per Feistel round."""


def derive_key(*parts: int | str) -> Key:
    """Derive the round keys from a path of names and numbers, for example ``(seed, "rows", source, epoch)``."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = blake2b(text.encode(), digest_size=8 * NUM_ROUNDS).digest()
    return Key(tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(NUM_ROUNDS)))


def permuted(index: int, size: int, key: Key) -> int:
    """Image of ``index`` under the permutation of ``range(size)`` that ``key`` selects.

    Expected cost: fewer than two passes through the network, whatever ``size`` is.
    """
    assert 0 <= index < size
    num_bits = max(2, (size - 1).bit_length())
    image: int = _feistel(index, num_bits, key)
    while image >= size:
        image = _feistel(image, num_bits, key)
    return image


def permutation_of_power(num_bits: int, key: Key) -> npt.NDArray[np.int64]:
    """The whole permutation of ``range(2 ** num_bits)`` at once: int64 ``[2 ** num_bits]``; ``num_bits >= 2``."""
    images: npt.NDArray[np.uint64] = _feistel(np.arange(1 << num_bits, dtype=np.uint64), num_bits, key)
    return images.astype(np.int64)


def _feistel(words: Any, num_bits: int, key: Key) -> Any:
    """Permute ``num_bits``-bit words: the halves are mixed into each other in turn, each round undoable by itself.

    ``words`` is an int or an array of uint64; the same expressions serve both, so the two cannot differ.
    """
    low_bits = num_bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (num_bits - low_bits)) - 1
    low, high = words & low_mask, words >> low_bits
    for round_index, round_key in enumerate(key):
        if round_index % 2:
            low = low ^ (_mix(high, round_key) & low_mask)
        else:
            high = high ^ (_mix(low, round_key) & high_mask)
    return (high << low_bits) | low


def _mix(words: Any, round_key: int) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over the keyed words."""
    words = words ^ round_key
    words = ((words ^ (words >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    words = ((words ^ (words >> 27)) * 0x94D049BB133111EB) & _MASK64
    return words ^ (words >> 31)
