"""Converts text to token ids with a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from importlib.resources import files
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3next_train.data.end_token import EOS_CANDIDATES, choose_end_token
from qwen3next_train.data.reading import read_small_file
from qwen3next_train.data.seams import Piece, join_pieces
from qwen3next_train.errors import ConfigError, DataError

BUILTIN = "builtin:python-4k"

_MAX_FILE_BYTES = 1 << 30

GROUP_CHARS = 1 << 22
"""Characters encoded at a time: enough for all cores, and some hundred MB of the library's working memory."""

PIECE_CHARS = 1 << 19
"""Longer documents are encoded in pieces: one text keeps only one core busy, and however long it is, the working
memory is that of :data:`GROUP_CHARS`."""

OVERLAP_CHARS = 1 << 11
"""How far a piece reaches into its neighbours; the tokens of both are compared there."""

_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\n(?=[ \t]*\S)"), re.compile(r"(?<=\S)(?= \S)"))
"""Where to cut, best first: before an unindented line, before any line with text, before a space and a word."""


class Tokenizer:
    """A tokenizer whose documents end with an end-of-document token and cannot contain special ones by accident.

    Text that spells a special token (``<|endoftext|>`` in a crawled page) is encoded as the text it is.

    Args:
        name: :data:`BUILTIN`, a ``tokenizer.json``, or a folder with one.
        eos_token: the token that ends a document; empty: the one that the tokenizer names
            (:func:`~qwen3next_train.data.end_token.choose_end_token`).

    Raises:
        ConfigError: no such file, not a tokenizer, or no token to end documents with.
        StorageError: the file cannot be read now.
    """

    def __init__(self, name: str, eos_token: str = "") -> None:
        import tokenizers

        path, folder, content = _read(name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # noqa: BLE001  the Rust library raises bare Exception
            raise ConfigError(f"data.tokenizer: {path}: not a tokenizer.json ({error}); name another") from None
        # Settings that files carry from fine-tuning; truncation would drop most of a long document in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._is_bpe = isinstance(self._tokenizer.model, tokenizers.models.BPE)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocab.values(), default=-1) + 1
        """One more than the largest id."""
        end = choose_end_token(eos_token, path, folder, vocab)
        self.eos_token = end.token
        self.eos_token_id: int = vocab[end.token]
        # As it was before the token could be chosen, so that stores of then and now go together where they can.
        usual = next((token for token in EOS_CANDIDATES if token in vocab), None)
        chosen = "" if end.token == usual else f"\0{end.token}"
        self.fingerprint = blake2b((content + chosen).encode(), digest_size=16).hexdigest()
        """Hash of the file and of an unusual end-of-document token; equal for equal tokenizers wherever they lie."""
        self._description = (
            f"tokenizer {path}: {self.num_ids:,} ids, "
            f"documents end with {end.token!r} ({self.eos_token_id}, by {end.named_by})"
        )

    def describe(self, vocab_size: int) -> str:
        """One line about the tokenizer beside a model with ``vocab_size`` rows of embedding."""
        unused = vocab_size - self.num_ids
        if unused <= 0:
            return self._description
        return f"{self._description}; {unused:,} of the {vocab_size:,} rows of model.vocab_size belong to no id of it"

    def require_vocab_size(self, vocab_size: int) -> None:
        """Reject a model whose embedding is smaller than the vocabulary.

        Raises:
            ConfigError: some token has no row in the embedding.
        """
        if self.num_ids > vocab_size:
            raise ConfigError(
                f"model.vocab_size: {vocab_size} is smaller than the tokenizer's {self.num_ids} ids; "
                "raise it or choose another data.tokenizer"
            )

    def encode_documents(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Encode texts on all cores: for each, int64 ``[n]`` ending with :attr:`eos_token_id`.

        A long text is encoded in pieces, with the tokens that it has as a whole.
        """
        spans = [_overlapping_spans(text) for text in texts]
        parts = [text[start:stop] for text, of_text in zip(texts, spans, strict=True) for start, stop in of_text]
        encoded = self._encode_parts(parts, with_offsets=len(parts) > len(texts))
        for text, of_text in zip(texts, spans, strict=True):
            if len(of_text) == 1:
                ids = np.array(next(encoded).ids, dtype=np.int64)
            else:
                pieces = [_piece(start, stop, next(encoded)) for start, stop in of_text]
                ids = join_pieces(pieces, partial(self._encode_span, text), inside_words=self._is_bpe)
            yield np.concatenate([ids, [self.eos_token_id]])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones as they are spelled; bytes that are no character are replacement characters."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _encode_parts(self, parts: Sequence[str], *, with_offsets: bool) -> Iterator[Any]:
        """Encode texts, some at a time; more would not be faster, only larger."""
        encode = self._tokenizer.encode_batch if with_offsets else self._tokenizer.encode_batch_fast
        group: list[str] = []
        num_chars = 0
        for index, part in enumerate(parts, start=1):
            group.append(part)
            num_chars += len(part)
            if index == len(parts) or num_chars >= GROUP_CHARS:
                yield from encode(group, add_special_tokens=False)
                group, num_chars = [], 0

    def _encode_span(self, text: str, start: int, stop: int) -> Piece:
        (encoding,) = self._tokenizer.encode_batch([text[start:stop]], add_special_tokens=False)
        return _piece(start, stop, encoding)


def _piece(start: int, stop: int, encoding: Any) -> Piece:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
    return Piece(start, stop, np.array(encoding.ids, dtype=np.int64), offsets, np.array(encoding.word_ids, np.int64))


def _overlapping_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of the pieces a text is encoded in, each reaching into its neighbours."""
    overlap = min(OVERLAP_CHARS, PIECE_CHARS // 4)
    cuts = [0, *accumulate(len(piece) for piece in split_text(text, PIECE_CHARS))]
    return [(max(0, start - overlap), min(len(text), stop + overlap)) for start, stop in pairwise(cuts)]


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a long text into pieces of at most ``max_chars`` that concatenate to it.

    Cuts lie in a piece's second half, at the last of :data:`_CUTS`, around which tokenizers agree soonest; anywhere if
    there is none.
    """
    start = 0
    while len(text) - start > max_chars:
        stop = start + max_chars
        cut = stop
        for pattern in _CUTS:
            matches = list(pattern.finditer(text, start + max_chars // 2, stop + 1))
            if matches:
                cut = matches[-1].end()
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read(name: str) -> tuple[str, Path | None, str]:
    """Return what to call the tokenizer's file in messages, the folder of its settings, and its content."""
    if name == BUILTIN:
        asset = files("qwen3next_train.data").joinpath("assets", "python-4k", "tokenizer.json")
        return BUILTIN, None, asset.read_text(encoding="utf-8")
    if name.startswith("builtin:"):
        raise ConfigError(f"data.tokenizer: no builtin tokenizer {name!r}; the only one is {BUILTIN}")
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    # Settings beside a file of another name may be those of another tokenizer.
    folder = path.parent if path.name == "tokenizer.json" else None
    try:
        return str(path), folder, read_small_file(path, max_bytes=_MAX_FILE_BYTES).decode()
    except (DataError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, DataError) else f"{path}: cannot be read ({error}); convert the file"
        raise ConfigError(f"data.tokenizer: {reason}, or name another tokenizer.json") from None
