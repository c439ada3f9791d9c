"""Joins the tokens of a long text's overlapping pieces so that they are those of the whole text.

Two neighbours see the text around their cut both, and tokenise it alike except near where each begins or ends: there a
normaliser may have put something before the text, or a word is cut. Where they agree for :data:`MATCHING_TOKENS`
tokens, what is before comes from one and what is behind from the other.

Agreement alone is not enough. A pre-tokeniser that takes digits three at a time may be at another digit in either
piece and still give the same tokens for a while. So the seam lies where a word (a part of the text that the
pre-tokeniser has cut out) begins in both: a pre-tokeniser looks ahead, not back. Only where the neighbours see one word
and no end of it, the seam may lie inside, and only for BPE: a sequence of tokens is the encoding of its text if every
two neighbours are (https://github.com/github/rust-gems, ``bpe``), and any two are neighbours in one of the pieces.
Where there is no seam, the pieces are encoded as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

MATCHING_TOKENS = 16


@dataclass(frozen=True)
class Piece:
    """A part of a text and its tokens.

    Args:
        start: where it begins in the text, in characters.
        stop: where it ends.
        ids: int64 ``[n]``.
        offsets: int64 ``[n, 2]``: begin and end of each token in the text, in characters.
        words: int64 ``[n]``: number of the word that each token is part of.
        num_parts: how many pieces of the usual size it is made of.
    """

    start: int
    stop: int
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    num_parts: int = 1


def join_pieces(
    pieces: Sequence[Piece], encode: Callable[[int, int], Piece], *, inside_words: bool
) -> npt.NDArray[np.int64]:
    """The ids of the whole text: int64 ``[n]``.

    Args:
        pieces: in order, each overlapping the next, the first from the text's start and the last to its end.
        encode: encodes the text between two positions as one piece.
        inside_words: whether a seam may lie inside a word, which is right for BPE.
    """
    left = list(pieces)
    seams: list[tuple[int, int]] = []
    while len(seams) + 1 < len(left):
        index = len(seams)
        seam = _seam(left[index], left[index + 1], inside_words=inside_words)
        if seam is not None:
            seams.append(seam)
            continue
        # As many again, so that a text without any seam is not encoded once for each of its pieces.
        stop = min(len(left), index + 1 + left[index].num_parts)
        merged = encode(left[index].start, left[stop - 1].stop)
        num_parts = sum(piece.num_parts for piece in left[index:stop])
        left[index:stop] = [replace(merged, num_parts=num_parts)]
        # The seam before it is looked for again: the piece has another end now.
        del seams[max(0, index - 1) :]
    starts = [0, *(start for _, start in seams)]
    stops = [*(stop for stop, _ in seams), len(left[-1].ids)]
    return np.concatenate([piece.ids[a:b] for piece, a, b in zip(left, starts, stops, strict=True)])


def _seam(before: Piece, after: Piece, *, inside_words: bool) -> tuple[int, int] | None:
    """How many tokens of ``before`` to take, and from which one of ``after`` to go on; None if there is no seam."""
    # Sorted but for tokens that are parts of one character, which begin at the same place.
    first = int(np.searchsorted(before.offsets[:, 0], after.start))
    last = int(np.searchsorted(after.offsets[:, 0], before.stop))
    a = np.column_stack([before.ids[first:], before.offsets[first:]])
    b = np.column_stack([after.ids[:last], after.offsets[:last]])
    begins_a = np.diff(before.words[first:], prepend=before.words[first : first + 1]) != 0
    begins_b = np.diff(after.words[:last], prepend=after.words[:1]) != 0
    inside_words = inside_words and not begins_a.any() and not begins_b.any()
    middle_first = sorted(range(1, MATCHING_TOKENS), key=lambda index: abs(index - MATCHING_TOKENS // 2))
    places = {int(begin): index for index, begin in reversed(list(enumerate(a[:, 1])))}
    row = 0
    while row + MATCHING_TOKENS <= len(b):
        place = places.get(int(b[row, 1]), len(a))
        if place + MATCHING_TOKENS <= len(a):
            differing = np.flatnonzero(
                (a[place : place + MATCHING_TOKENS] != b[row : row + MATCHING_TOKENS]).any(axis=1)
            )
            if len(differing):
                row += int(differing[0])
            else:
                for index in middle_first:
                    if inside_words or (begins_a[place + index] and begins_b[row + index]):
                        return first + place + index, row + index
        row += 1
    return None
