"""Train the packaged tokenizer again: byte-level BPE on the Python standard library's sources.

    python scripts/data/train_tokenizer.py qwen3next_train/data/assets/python-4k/tokenizer.json

The result depends on the Python version whose library it reads (the packaged file: 3.11.7).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.sources import PYTHON_STDLIB, FileSource, resolve
from qwen3next_train.data.tokenizer_training import END_OF_DOCUMENT, train_bpe

# Words with the character before them, digits in groups of up to three, punctuation runs, line breaks, spaces:
# the split of Qwen's and GPT-4's tokenizers without the English contractions. The
# train-tokenizer subcommand splits as Qwen's does.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    """Parse the command line, train, save, and print the bytes per token on the training text."""
    parser = argparse.ArgumentParser(description="train a byte-level BPE on the Python standard library's sources")
    parser.add_argument("output", type=Path, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, <|endoftext|> and 256 bytes included")
    arguments = parser.parse_args()

    source = resolve(SourceConfig(source=PYTHON_STDLIB))
    assert isinstance(source, FileSource)
    texts = [document.text for document in read_documents(source, {})]
    tokenizer = train_bpe(texts, vocab_size=arguments.vocab_size, special_tokens=[END_OF_DOCUMENT], split=SPLIT)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output))
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} tokens, {num_bytes / num_tokens:.3f} bytes per token")


if __name__ == "__main__":
    main()
