"""Sources that are ready to be cut into rows: opened stores, and what is known of their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.data.digests import digest_of
from qwen3next_train.data.folders import PassedOver
from qwen3next_train.data.left_out import LeftOuts
from qwen3next_train.data.token_store import DocumentRange, TokenStore


@dataclass(frozen=True)
class PreparedSource:
    """Documents of one source, ready to be cut into rows.

    Args:
        label: the source as the user wrote it.
        weight: relative share of the samples.
        documents: the documents.
        num_bytes: UTF-8 bytes of the documents, None where unknown (a foreign token store, ready token ids).
        fingerprint: digest of the content, wherever it lies.
        tokenizer_fingerprint: of the tokenizer that made the ids, None where unknown.
        build_s: seconds of tokenisation, None when nothing had to be tokenised.
        passed_over: files of a folder or glob that were not read.
        left_out: documents that were not taken, by reason; of both parts of a source.
    """

    label: str
    weight: float
    documents: DocumentRange
    num_bytes: int | None
    fingerprint: str
    tokenizer_fingerprint: str | None
    build_s: float | None
    passed_over: tuple[PassedOver, ...] = ()
    left_out: LeftOuts = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedData:
    """All data of a run.

    Args:
        train: training sources in the order of the configuration.
        validation: held-out sources; empty when nothing is held out.
        eos_token_id: end-of-document token; None when all sources are token stores (no tokenizer was read).
        vocab_size: the model's; larger ids in a store are an error where they are met.
        tokenizer: one line about the tokenizer; empty when none was read.
        validation_sets: the sources of each named validation set.
    """

    train: tuple[PreparedSource, ...]
    validation: tuple[PreparedSource, ...]
    eos_token_id: int | None
    vocab_size: int
    tokenizer: str = ""
    validation_sets: Mapping[str, tuple[PreparedSource, ...]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest of training content and weights: equal if and only if a resumed run would see the same stream."""
        return digest_of(
            *(
                [
                    source.fingerprint,
                    repr(source.weight),
                    source.documents.documents.start,
                    source.documents.documents.stop,
                ]
                for source in self.train
            )
        )


def prepared_source(
    source: SourceConfig,
    store: TokenStore,
    fingerprint: str,
    *,
    documents: range | None = None,
    build_s: float | None = None,
) -> PreparedSource:
    """A store, or the given documents of it, as a prepared source.

    Raises:
        DataError: the store is damaged.
        StorageError: it cannot be read now.
    """
    meta = store.meta()
    everything = range(store.num_documents)
    chosen = everything if documents is None else documents
    return PreparedSource(
        label=source.source,
        weight=source.weight,
        documents=DocumentRange(store, chosen),
        num_bytes=meta.num_bytes if meta is not None and chosen == everything else None,
        fingerprint=fingerprint,
        tokenizer_fingerprint=None if meta is None else meta.tokenizer_fingerprint,
        build_s=build_s,
    )
