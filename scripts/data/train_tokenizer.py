"""Train the packaged tokenizer: byte-level BPE on the Python standard library's sources.

    python scripts/data/train_tokenizer.py qwen3next_train/data/assets/python-4k/tokenizer.json

The result depends on the Python version whose library it reads (the packaged file: 3.11.7).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.documents import read_documents
from qwen3next_train.data.sources import PYTHON_STDLIB, FileSource, resolve

# Words with the character before them, digits in groups of up to three, punctuation runs, line breaks, spaces:
# the split of Qwen's and GPT-4's tokenizers without the English contractions.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    """Parse the command line, train, save, and print the bytes per token on the training text."""
    parser = argparse.ArgumentParser(description="train a byte-level BPE on the Python standard library's sources")
    parser.add_argument("output", type=Path, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, <|endoftext|> and 256 bytes included")
    arguments = parser.parse_args()

    source = resolve(SourceConfig(source=PYTHON_STDLIB))
    assert isinstance(source, FileSource)
    texts = [document.text for document in read_documents(source, Counter())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output))
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} tokens, {num_bytes / num_tokens:.3f} bytes per token")


if __name__ == "__main__":
    main()
