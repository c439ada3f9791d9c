"""Bits per byte of gzip and of bigram models on a configuration's held-out documents.

What a trained model has to beat: ``python scripts/benchmarks/held_out_baselines.py --config qwen3next_tiny.yaml``.
The bigram models are fitted on all training documents. The token bigram uses absolute discounting (Ney, Essen,
Kneser 1994) with the unigram distribution as its lower order.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import tokenizers

from qwen3next_train.cli.arguments import parse_arguments
from qwen3next_train.cli.commands import OPTIONS, load
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.prepared import PreparedSource

DISCOUNT = 0.75


def main(argv: list[str]) -> int:
    """Print one line per baseline."""
    config = load(parse_arguments(argv, OPTIONS)).config
    prepared = prepare_stores(config)
    vocab_size = config.model.vocab_size
    asset = files("qwen3next_train.data").joinpath("assets", "python-4k", "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_str(asset.read_text(encoding="utf-8"))
    assert prepared.eos_token_id is not None
    held_out = [ids for source in prepared.validation for ids in _documents(source)]
    texts = [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False).encode() for ids in held_out]
    num_bytes = sum(len(text) for text in texts)
    print(f"held out: {len(texts)} documents, {num_bytes:,} bytes, {sum(map(len, held_out)):,} tokens")
    per_file = sum(len(gzip.compress(text, 9)) for text in texts)
    print(f"gzip -9, file by file     {8 * per_file / num_bytes:.3f} bits per byte")
    print(f"gzip -9, one stream       {8 * len(gzip.compress(b''.join(texts), 9)) / num_bytes:.3f}")
    counts = np.ones((256, 256))
    for source in prepared.train:
        for ids in _documents(source):
            data = np.frombuffer(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False).encode(), np.uint8)
            np.add.at(counts, (data[:-1], data[1:]), 1)
    log2 = np.log2(counts / counts.sum(axis=1, keepdims=True))
    bits = sum(8 - float(log2[data[:-1], data[1:]].sum()) for data in (np.frombuffer(t, np.uint8) for t in texts if t))
    print(f"byte bigram               {bits / num_bytes:.3f}")
    nats = _token_bigram_nats(prepared.train, held_out, vocab_size, prepared.eos_token_id)
    print(f"token bigram              {nats / math.log(2) / num_bytes:.3f}")
    return 0


def _documents(source: PreparedSource) -> Iterator[npt.NDArray[np.int64]]:
    """Token ids of each document, the end-of-document token included."""
    documents = source.documents
    starts = documents.document_starts_between(0, documents.num_tokens)
    for start, stop in zip(starts, [*starts[1:], documents.num_tokens], strict=True):
        yield documents.read(int(start), int(stop))


def _token_bigram_nats(
    train: tuple[PreparedSource, ...], held_out: list[npt.NDArray[np.int64]], vocab_size: int, eos: int
) -> float:
    """Nats of the held-out tokens, each document's first token predicted from the end-of-document token."""
    counts = np.zeros((vocab_size, vocab_size), dtype=np.float32)
    for source in train:
        for ids in _documents(source):
            np.add.at(counts, (np.concatenate([[eos], ids[:-1]]), ids), 1)
    unigram = (counts.sum(axis=0, dtype=np.float64) + 1) / (counts.sum(dtype=np.float64) + vocab_size)
    totals = counts.sum(axis=1, dtype=np.float64)
    reserved = np.where(totals > 0, DISCOUNT * (counts > 0).sum(axis=1) / np.maximum(totals, 1), 1.0)
    nats = 0.0
    for ids in held_out:
        previous = np.concatenate([[eos], ids[:-1]])
        seen = np.maximum(counts[previous, ids] - DISCOUNT, 0) / np.maximum(totals[previous], 1)
        nats -= float(np.log(seen + reserved[previous] * unigram[ids]).sum())
    return nats


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
