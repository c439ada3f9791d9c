"""The ``train-tokenizer`` subcommand: text becomes a folder with a tokenizer for this program and transformers."""

from __future__ import annotations

import json
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, write_file
from qwen3next_train.checkpoint.staged_folder import staged_folder
from qwen3next_train.config.schema import Config
from qwen3next_train.data.sources import format_bytes
from qwen3next_train.data.tokenizer_training import (
    END_OF_DOCUMENT,
    require_trainable,
    text_sources,
    train_on_sources,
)
from qwen3next_train.errors import ExitCode

_BYTES_PER_TOKEN = 100
"""Of ``tokenizer.json``, roughly and at most: the token and the merge that makes it."""


def train_tokenizer(config: Config, output: Path) -> int:
    """Train a byte-level BPE on ``data.sources`` and write it to a new folder.

    Args:
        config: ``data.sources`` (their weights are not read) and ``model.vocab_size``.
        output: folder to create; it appears whole or not at all.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: ``output`` exists, a source holds no text, or the vocabulary is too small, or too large for the
            text.
        DataError: a source is missing, unreadable, damaged or empty.
        StorageError: ``output`` cannot be written, or a source cannot be read now.
    """
    vocab_size = config.model.vocab_size
    require_trainable(vocab_size)
    sources = text_sources(config.data.sources)
    num_bytes = _BYTES_PER_TOKEN * vocab_size
    with staged_folder(LOCAL_FILESYSTEM, output, what="train-tokenizer", num_bytes=num_bytes) as staged:
        trained = train_on_sources(sources, vocab_size)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_DOCUMENT,
            "pad_token": END_OF_DOCUMENT,
            "clean_up_tokenization_spaces": False,
        }
        write_file(LOCAL_FILESYSTEM, staged / "tokenizer.json", trained.content.encode())
        write_file(LOCAL_FILESYSTEM, staged / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    print(
        f"{output}: {trained.num_tokens:,} tokens from {trained.num_documents:,} documents, "
        f"{format_bytes(trained.num_bytes)}"
    )
    print(f"to use it: --data.tokenizer {output} --model.vocab_size {trained.num_tokens}")
    return ExitCode.FINISHED
