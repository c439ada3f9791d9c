"""Small stores and configurations for the tests of this package."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3next_train.config.schema import Config
from qwen3next_train.data.store_writer import StoreWriter
from qwen3next_train.data.token_store import DocumentRange, TokenStore, token_dtype


def write_store(prefix: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 4096) -> TokenStore:
    with StoreWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
        writer.finish(source="test", tokenizer_fingerprint="none", num_bytes=None)
    return TokenStore(prefix)


def counting_store(prefix: Path, lengths: Sequence[int]) -> TokenStore:
    """A store whose token at position p is p, so that rows tell where they are from."""
    ends = np.cumsum(lengths)
    documents = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    return write_store(prefix, documents, vocab_size=1 << 20)


def everything(store: TokenStore) -> DocumentRange:
    return DocumentRange(store, range(store.num_documents))


def write_megatron(
    prefix: Path, sequences: Sequence[Sequence[int]], document_indices: Sequence[int], *, code: int, dtype: str
) -> None:
    """A store byte by byte as Megatron-LM's ``_IndexWriter`` writes it, several sequences to a document."""
    itemsize = np.dtype(dtype).itemsize
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:index]) * itemsize for index in range(len(lengths))]
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype=dtype).tobytes() for s in sequences))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(sequences))
        + struct.pack("<Q", len(document_indices))
        + np.array(lengths, dtype=np.int32).tobytes()
        + np.array(pointers, dtype=np.int64).tobytes()
        + np.array(document_indices, dtype=np.int64).tobytes()
    )


def make_config(cache_dir: Path, sources: Sequence[dict[str, Any]], **data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab_size": 4096},
            "data": {"sources": list(sources), "cache_dir": str(cache_dir), "sequence_length": 16, **data},
        }
    )


def config_of(tmp_path: Path, *sources: Path | str, **data: object) -> Config:
    return make_config(tmp_path / "cache", [{"source": str(source)} for source in sources], **data)
