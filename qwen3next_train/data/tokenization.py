"""Converts text to token ids with a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen3next_train.errors import ConfigError

BUILTIN = "builtin:python-4k"
EOS_CANDIDATES = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens taken as end of document, the first that the tokenizer has."""

GROUP_CHARS = 1 << 22
"""Characters encoded at a time: enough for all cores, and some hundred MB of the library's working memory."""

PIECE_CHARS = 1 << 19
"""Longer documents are encoded in pieces: one text keeps only one core busy, and however long it is, the working
memory is that of :data:`GROUP_CHARS`."""

_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\n(?=[ \t]*\S)"), re.compile(r"(?<=\S)(?= \S)"))
"""Where to cut, best first: before an unindented line, before any line with text, before a space and a word."""


class Tokenizer:
    """A tokenizer whose documents end with an end-of-document token and cannot contain special ones by accident.

    Text that spells a special token (``<|endoftext|>`` in a crawled page) is encoded as the text it is.

    Args:
        name: :data:`BUILTIN`, a ``tokenizer.json``, or a folder with one.

    Raises:
        ConfigError: no such file, not a tokenizer, or none of :data:`EOS_CANDIDATES` is in its vocabulary.
    """

    def __init__(self, name: str) -> None:
        import tokenizers

        path, content = _read(name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # noqa: BLE001  the Rust library raises bare Exception
            raise ConfigError(f"data.tokenizer: {path}: not a tokenizer.json ({error})") from None
        # Settings that files carry from fine-tuning; truncation would drop most of a long document in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocab.values(), default=-1) + 1
        """One more than the largest id."""
        eos = next((token for token in EOS_CANDIDATES if token in vocab), None)
        if eos is None:
            raise ConfigError(
                f"data.tokenizer: {path}: no end-of-document token, looked for {', '.join(EOS_CANDIDATES)}; "
                "add one of them to the tokenizer"
            )
        self.eos_token = eos
        self.eos_token_id: int = vocab[eos]
        self.fingerprint = blake2b(content.encode(), digest_size=16).hexdigest()
        """Hash of the file; equal for equal tokenizers wherever they lie."""

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
        """Encode texts on all cores: for each, int64 ``[n]`` ending with :attr:`eos_token_id`."""
        pieces = [list(split_text(text, PIECE_CHARS)) for text in texts]
        encoded = self._encode_pieces([piece for group in pieces for piece in group])
        for group in pieces:
            ids = [next(encoded) for _ in group]
            yield np.concatenate([*ids, [self.eos_token_id]])

    def _encode_pieces(self, pieces: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
        """Encode pieces, some at a time; more would not be faster, only larger."""
        group: list[str] = []
        num_chars = 0
        for index, piece in enumerate(pieces, start=1):
            group.append(piece)
            num_chars += len(piece)
            if index == len(pieces) or num_chars >= GROUP_CHARS:
                for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                    yield np.array(encoding.ids, dtype=np.int64)
                group, num_chars = [], 0


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a long text into pieces of at most ``max_chars`` that concatenate to it.

    Cuts lie in a piece's second half, at the last of :data:`_CUTS`, where byte-level tokenizers do not merge, so
    that their ids are those of the whole text; anywhere if there is none.
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


def _read(name: str) -> tuple[str, str]:
    """Return what to call the tokenizer's file in messages, and its content."""
    if name == BUILTIN:
        asset = files("qwen3next_train.data").joinpath("assets", "python-4k", "tokenizer.json")
        return BUILTIN, asset.read_text(encoding="utf-8")
    if name.startswith("builtin:"):
        raise ConfigError(f"data.tokenizer: no builtin tokenizer {name!r}; the only one is {BUILTIN}")
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        return str(path), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.tokenizer: {path}: cannot be read ({error}); name a tokenizer.json") from None
