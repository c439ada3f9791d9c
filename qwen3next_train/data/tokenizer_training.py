"""Trains a byte-level BPE tokenizer on the text of sources.

Words are split as Qwen's tokenizer splits them; its Unicode normalisation is left out, so that every text comes back
byte for byte. The same documents in the same order give the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3next_train.config.error_lines import show_name
from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.left_out import LeftOuts, format_left_out
from qwen3next_train.data.prepare import log_left_out, log_passed_over
from qwen3next_train.data.progress import Progress
from qwen3next_train.data.sources import FileSource, format_bytes, resolve
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.log import get_logger

if TYPE_CHECKING:
    import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>")
"""Those of Qwen's that text and chats need; they have the first ids."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where words end, of the ``tokenizer.json`` that Qwen publishes: English contractions, words with the character before
them, single digits, punctuation, line breaks, spaces."""

NUM_BYTES = 256
"""Tokens of one byte, which every text can be spelled with."""

_MIN_FREQUENCY = 2
"""Of a pair that becomes a token: what occurs once tells nothing of other text."""


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer and what it was trained on.

    Args:
        content: its ``tokenizer.json``.
        num_tokens: special ones included.
        num_documents: documents read.
        num_bytes: bytes of their text.
    """

    content: str
    num_tokens: int
    num_documents: int
    num_bytes: int


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str], split: str
) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE.

    Args:
        texts: documents, read once and one at a time.
        vocab_size: tokens at most, the special ones and all bytes included.
        special_tokens: they get the first ids.
        split: pattern of the pieces that no token reaches across.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def require_trainable(vocab_size: int) -> None:
    """Reject a vocabulary without room for a single merge.

    Raises:
        ConfigError: says the least size.
    """
    least = NUM_BYTES + len(SPECIAL_TOKENS) + 1
    if vocab_size < least:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is too small for a tokenizer; give at least {least}: {NUM_BYTES} bytes, "
            f"{len(SPECIAL_TOKENS)} special tokens and one more"
        )


def text_sources(sources: Sequence[SourceConfig]) -> tuple[FileSource, ...]:
    """The files of sources that hold text.

    Raises:
        ConfigError: there is no source, or one is a token store.
        DataError: as :func:`~qwen3next_train.data.sources.resolve`.
        StorageError: as :func:`~qwen3next_train.data.sources.resolve`.
    """
    if not sources:
        raise ConfigError("data.sources: no source (got []); name your text, such as --sources 'corpus/*.parquet'")
    found = []
    for source in sources:
        files = resolve(source)
        if not isinstance(files, FileSource):
            raise ConfigError(f"{source.source} is a token store; a tokenizer is trained on text, name it")
        found.append(files)
    return tuple(found)


def train_on_sources(sources: Sequence[FileSource], vocab_size: int) -> TrainedTokenizer:
    """Train a tokenizer on every document of every source, whatever the sources' weights.

    Args:
        sources: read one after the other, in stored order.
        vocab_size: tokens that it has to have.

    Raises:
        ConfigError: the text is too short for so many tokens.
        DataError: a document is broken or has token ids instead of text, or there are none.
        StorageError: a file cannot be read now.
    """
    reader = _Reader(sources)
    tokenizer = train_bpe(reader, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, split=QWEN_SPLIT)
    num_tokens = tokenizer.get_vocab_size()
    if num_tokens < vocab_size:
        raise ConfigError(
            f"model.vocab_size: {format_bytes(reader.num_bytes)} of text give no more than {num_tokens:,} tokens "
            f"(got {vocab_size:,}); ask for at most so many, or name more text"
        )
    return TrainedTokenizer(tokenizer.to_str(pretty=True), num_tokens, reader.num_documents, reader.num_bytes)


class _Reader:
    """The texts of all sources, once, counted on their way and with a progress line for each source."""

    def __init__(self, sources: Sequence[FileSource]) -> None:
        self._sources = sources
        self.num_documents = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            log_passed_over(source)
            yield from self._texts(source)
        get_logger().info(
            "%s documents, %s read; merging pairs", f"{self.num_documents:,}", format_bytes(self.num_bytes)
        )

    def _texts(self, source: FileSource) -> Iterator[str]:
        left_out: LeftOuts = {}
        total_bytes = sum(file.path.stat().st_size for file in source.files if file.path.is_file())
        progress = Progress(source.label, total_bytes, unit="documents")
        num_documents = num_bytes = 0
        try:
            for document in read_documents(source, left_out):
                if document.token_ids is not None:
                    raise DataError(
                        f"{show_name(document.where)}: token ids, no text; a tokenizer is trained on text, name it"
                    )
                num_documents += 1
                num_bytes += len(document.text.encode())
                progress.update(num_documents, document.position, num_bytes)
                yield document.text
        finally:
            progress.close()
        if not num_documents:
            raise DataError(f"{source.label}: no documents ({format_left_out(left_out)}); check the source")
        log_left_out(source, left_out)
        self.num_documents += num_documents
        self.num_bytes += num_bytes
