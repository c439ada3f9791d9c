from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen3next_train.data.seams import MATCHING_TOKENS, Piece, join_pieces

TEXT = "".join(chr(97 + n * n % 23) for n in range(400))


def piece(start: int, stop: int, width: int, *, word: int = 1000) -> Piece:
    """Tokens of ``width`` characters from ``start`` on; a new word begins wherever ``word`` divides the position."""
    begins = np.arange(start, stop, width)
    ends = np.minimum(begins + width, stop)
    ids = np.array([ord(TEXT[begin]) * 100 for begin in begins]) + ends - begins
    return Piece(start, stop, ids, np.column_stack([begins, ends]), begins // word)


class Encoder:
    """Encodes spans and keeps which."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.spans: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> Piece:
        self.spans.append((start, stop))
        return piece(start, stop, self.width)


@pytest.mark.parametrize(("word", "inside_words"), [(1000, True), (8, True), (8, False)])
def test_pieces_that_agree_are_joined_without_encoding_again(word: int, inside_words: bool) -> None:
    encode = Encoder(2)
    pieces = [piece(a, b, 2, word=word) for a, b in ((0, 160), (100, 260), (200, 400))]
    assert join_pieces(pieces, encode, inside_words=inside_words).tolist() == piece(0, 400, 2).ids.tolist()
    assert encode.spans == []


def test_inside_a_word_only_bpe_may_be_joined() -> None:
    encode = Encoder(2)
    pieces = [piece(0, 200, 2), piece(100, 400, 2)]
    assert join_pieces(pieces, encode, inside_words=False).tolist() == piece(0, 400, 2).ids.tolist()
    assert encode.spans == [(0, 400)]


def test_words_that_begin_at_other_places_are_no_seam() -> None:
    encode = Encoder(1)
    after = piece(100, 400, 1, word=3)
    pieces = [piece(0, 200, 1, word=3), replace(after, words=(after.offsets[:, 0] + 1) // 3)]
    assert join_pieces(pieces, encode, inside_words=True).tolist() == piece(0, 400, 1).ids.tolist()
    assert encode.spans == [(0, 400)]


def test_pieces_that_never_agree_are_encoded_as_one() -> None:
    encode = Encoder(3)
    # Tokens of three characters, out of phase from piece to piece.
    pieces = [piece(a, b, 3) for a, b in ((0, 160), (100, 260), (200, 360), (302, 400))]
    assert join_pieces(pieces, encode, inside_words=True).tolist() == piece(0, 400, 3).ids.tolist()
    assert encode.spans == [(0, 260), (0, 400)]


def test_too_few_common_tokens_are_no_seam() -> None:
    encode = Encoder(1)
    pieces = [piece(0, 200, 1), piece(200 - MATCHING_TOKENS + 1, 400, 1)]
    assert join_pieces(pieces, encode, inside_words=True).tolist() == piece(0, 400, 1).ids.tolist()
    assert encode.spans == [(0, 400)]
