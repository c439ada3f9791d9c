"""Turns configured sources into opened token stores: tokenises once, splits, checks that all belongs together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data.digests import digest_files, digest_of, digest_store
from qwen3next_train.data.folders import PassedOver
from qwen3next_train.data.sealed_json import read_sealed, write_sealed
from qwen3next_train.data.sources import FileSource, format_passed_over, resolve
from qwen3next_train.data.store_builder import build_stores, format_left_out
from qwen3next_train.data.store_cache import default_cache_dir, get_or_build
from qwen3next_train.data.store_output import is_written, require_unused, write_store
from qwen3next_train.data.token_store import DocumentRange, TokenStore
from qwen3next_train.data.tokenization import Tokenizer
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.log import get_logger

FORMAT_VERSION = 3
"""Part of the cache's keys: raise it when the same sources would be tokenised or split differently."""

CHECKED_AT_START_BYTES = 4 << 30
"""Of tokens and indices that are compared with their hashes before the first step: some seconds. What is beyond is
checked as it is read, block by block, so that a run over terabytes starts at once."""

_LEFT_OUT_NAME = "left_out.json"
_MAX_LEFT_OUT_BYTES = 1 << 16


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
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedData:
    """All data of a run.

    Args:
        train: training sources in the order of the configuration.
        validation: held-out sources; empty when nothing is held out.
        eos_token_id: end-of-document token; None when all sources are token stores (no tokenizer was read).
        vocab_size: the model's; larger ids in a store are an error where they are met.
        tokenizer: one line about the tokenizer; empty when none was read.
    """

    train: tuple[PreparedSource, ...]
    validation: tuple[PreparedSource, ...]
    eos_token_id: int | None
    vocab_size: int
    tokenizer: str = ""

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


def prepare_stores(config: Config) -> PreparedData:
    """Open, and where needed first tokenise, all sources of a run. Any number of processes may call it at once.

    Text is split document by document, by hash. A token store's held-out part is its last documents, a view
    without copy, as in Megatron-LM's ``--split``.

    Raises:
        ConfigError: no source is named, or the tokenizer is missing, too large for the model, or not the one that
            made a store.
        DataError: a source is missing, unreadable, damaged or empty.
        StorageError: the cache cannot be written.
    """
    _require_sources(config)
    preparer = _Preparer(config)
    fraction = 0.0 if config.data.validation_sources else config.data.validation_fraction
    pairs = [preparer.prepare(source, fraction) for source in config.data.sources]
    if config.data.validation_sources:
        validation = [preparer.prepare(source, 0.0)[0] for source in config.data.validation_sources]
    else:
        validation = [held_out for _, held_out in pairs if held_out is not None]
    return preparer.collect([train for train, _ in pairs], validation)


def prepare_evaluation(config: Config, source: SourceConfig) -> PreparedData:
    """Prepare one source to be evaluated whole: everything is in ``validation``, and there is no training part.

    Raises:
        ConfigError: as :func:`prepare_stores`.
        DataError: as :func:`prepare_stores`.
        StorageError: as :func:`prepare_stores`.
    """
    preparer = _Preparer(config)
    return preparer.collect([], [preparer.prepare(source, 0.0)[0]])


def tokenize(config: Config, output: Path | None) -> int:
    """The ``tokenize`` subcommand: tokenise all sources and print a line for each; return the exit code.

    Args:
        config: sources, tokenizer and cache.
        output: prefix of the store to write, holding all documents of the source; several sources get
            ``PREFIX_00``, ``PREFIX_01``, …. None: fill the cache, split as training will find it.

    Raises:
        ConfigError: the output exists, or as :func:`prepare_stores`.
        DataError: as :func:`prepare_stores`.
        StorageError: the cache or output cannot be written.
    """
    if output is None:
        prepared = prepare_stores(config)
        for part, found in (("train", prepared.train), ("validation", prepared.validation)):
            for prepared_source in found:
                print(_describe(prepared_source, part))
        return 0
    _require_sources(config)
    preparer = _Preparer(config)
    sources = [*config.data.sources, *config.data.validation_sources]
    if not output.name or output.name == ".." or "\0" in str(output):
        raise ConfigError(
            f"--output: not a file name (got {str(output)!r}); give the prefix of the .bin and .idx files"
        )
    several = len(sources) > 1
    prefixes = [output.with_name(f"{output.name}_{index:02d}") if several else output for index in range(len(sources))]
    outputs = [preparer.output(source, prefix) for source, prefix in zip(sources, prefixes, strict=True)]
    # Some are there: an earlier call was interrupted. All are there: it was not, and they are not written again.
    are_written = [is_written(each.prefix, each.key) for each in outputs]
    if all(are_written):
        are_written = [False] * len(outputs)
    for each, is_there in zip(outputs, are_written, strict=True):
        if not is_there:
            require_unused(each.prefix)
    for each, is_there in zip(outputs, are_written, strict=True):
        print(_describe(preparer.write(each, is_there=is_there), "all"))
    return 0


@dataclass(frozen=True)
class _Output:
    """A store to write.

    Args:
        source: as configured.
        files: its files.
        prefix: where to write it.
        key: digest of everything it depends on.
    """

    source: SourceConfig
    files: FileSource
    prefix: Path
    key: str


def _require_sources(config: Config) -> None:
    """Reject a run without data; a configuration may leave it open until then, as shipped ones do."""
    if not config.data.sources:
        raise ConfigError(
            "data.sources: no source (got []); name your text and its tokenizer, such as "
            "--data.sources 'corpus/*.parquet' --data.tokenizer path/to/tokenizer.json"
        )


class _Preparer:
    """Prepares single sources of one configuration; reads the tokenizer when the first text needs it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        data = config.data
        self._cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        self._tokenizer: Tokenizer | None = None
        self._unchecked_bytes = CHECKED_AT_START_BYTES

    @property
    def tokenizer(self) -> Tokenizer:
        """The configured tokenizer."""
        if self._tokenizer is None:
            data, vocab_size = self._config.data, self._config.model.vocab_size
            self._tokenizer = Tokenizer(data.tokenizer, data.eos_token)
            self._tokenizer.require_vocab_size(vocab_size)
        return self._tokenizer

    def _check(self, store: TokenStore) -> None:
        """Read a store in full while :data:`CHECKED_AT_START_BYTES` last; the others are checked as they are read."""
        if store.num_bytes <= self._unchecked_bytes:
            self._unchecked_bytes -= store.num_bytes
            store.check()

    def prepare(self, source: SourceConfig, held_out_fraction: float) -> tuple[PreparedSource, PreparedSource | None]:
        """Training and held-out part of one source."""
        resolved = resolve(source)
        if isinstance(resolved, FileSource):
            _log_passed_over(resolved)
            return self._prepare_files(source, resolved, held_out_fraction)
        store = TokenStore(resolved.prefix)
        self._check(store)
        num_held_out = int(store.num_documents * held_out_fraction)
        fingerprint = digest_store(store)
        num_train = store.num_documents - num_held_out
        train = _prepared(source, store, fingerprint, documents=range(num_train))
        if not num_held_out:
            return train, None
        held_out = range(num_train, store.num_documents)
        return train, _prepared(source, store, fingerprint, documents=held_out)

    def output(self, source: SourceConfig, prefix: Path) -> _Output:
        """What there is to write at ``prefix``."""
        files = resolve(source)
        if not isinstance(files, FileSource):
            raise ConfigError(f"data.sources: {source.source} is a token store already; name text to tokenize")
        _log_passed_over(files)
        content = digest_files(files.files, self._cache_dir)
        key = digest_of(FORMAT_VERSION, self.tokenizer.fingerprint, files.text_field, content)
        return _Output(source, files, prefix, key)

    def write(self, output: _Output, *, is_there: bool) -> PreparedSource:
        """Tokenise one source into a store of its own, unless it is there."""

        def build(staged: Path) -> float:
            left_out: Counter[str] = Counter()
            build_s = build_stores(
                output.files,
                self.tokenizer,
                train_prefix=staged,
                validation_prefix=staged.with_name("validation"),
                held_out_fraction=0.0,
                skipped=left_out,
                entry=output.key,
            )
            if left_out:
                get_logger().info("%s: left out %s", output.files.label, format_left_out(left_out))
            return build_s

        build_s = None if is_there else write_store(output.prefix, output.key, build)
        store = TokenStore(output.prefix)
        return _prepared(output.source, store, digest_store(store), build_s=build_s)

    def collect(self, train: Sequence[PreparedSource], validation: Sequence[PreparedSource]) -> PreparedData:
        """Check that one tokenizer made all ids, as far as that is known, and bundle the sources."""
        known = {source.tokenizer_fingerprint: source.label for source in (*train, *validation)}
        known.pop(None, None)
        if len(known) > 1:
            raise ConfigError(
                f"data.sources: tokenised with different tokenizers: {', '.join(sorted(known.values()))}; "
                "tokenize all with the same data.tokenizer"
            )
        eos_token_id = None if self._tokenizer is None else self._tokenizer.eos_token_id
        vocab_size = self._config.model.vocab_size
        described = "" if self._tokenizer is None else self._tokenizer.describe(vocab_size)
        return PreparedData(tuple(train), tuple(validation), eos_token_id, vocab_size, described)

    def _prepare_files(
        self, source: SourceConfig, files: FileSource, fraction: float
    ) -> tuple[PreparedSource, PreparedSource | None]:
        tokenizer = self.tokenizer
        content = digest_files(files.files, self._cache_dir)
        key = digest_of(FORMAT_VERSION, tokenizer.fingerprint, repr(fraction), files.text_field, content)

        def build(directory: Path) -> float:
            left_out: Counter[str] = Counter()
            build_s = build_stores(
                files,
                tokenizer,
                train_prefix=directory / "train",
                validation_prefix=directory / "validation",
                held_out_fraction=fraction,
                skipped=left_out,
                entry=key,
            )
            write_sealed(directory / _LEFT_OUT_NAME, left_out)
            return build_s

        def check(store: TokenStore) -> None:
            _read_left_out(store)
            self._check(store)

        cached = get_or_build(self._cache_dir, key, source.source, build, check)
        left_out = _read_left_out(cached.train)
        if left_out:
            get_logger().info("%s: left out %s", files.label, format_left_out(left_out))

        def part(name: str, store: TokenStore) -> PreparedSource:
            found = _prepared(source, store, f"{key}/{name}", build_s=cached.build_s)
            return replace(found, passed_over=files.passed_over, left_out=left_out)

        return (
            part("train", cached.train),
            None if cached.validation is None else part("validation", cached.validation),
        )


def _prepared(
    source: SourceConfig,
    store: TokenStore,
    fingerprint: str,
    *,
    documents: range | None = None,
    build_s: float | None = None,
) -> PreparedSource:
    """A store, or the given documents of it, as a prepared source."""
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


def _log_passed_over(files: FileSource) -> None:
    if files.passed_over:
        get_logger().info("%s: %d files read, %s", files.label, len(files.files), format_passed_over(files.passed_over))


def _read_left_out(store: TokenStore) -> dict[str, int]:
    """What :func:`build_stores` left out when the store of the cache was made.

    Raises:
        DataError: that is not known any more.
        StorageError: it cannot be read now.
    """
    path = store.prefix.with_name(_LEFT_OUT_NAME)
    counts = read_sealed(path, max_bytes=_MAX_LEFT_OUT_BYTES)
    if not isinstance(counts, dict):
        raise DataError(f"{path}: missing or damaged")
    return counts


def _describe(source: PreparedSource, part: str) -> str:
    """One line about a source for the ``tokenize`` subcommand."""
    documents = source.documents
    facts = [f"{documents.num_tokens:,} tokens", f"{len(documents.documents):,} documents"]
    if source.num_bytes is not None:
        facts.append(f"{source.num_bytes / documents.num_tokens:.3f} bytes/token")
    if source.build_s is None:
        facts.append("cached")
    elif part != "validation":
        facts.append(f"{documents.num_tokens / source.build_s:,.0f} tokens/s")
    return f"{source.label} {part}: {', '.join(facts)} -> {documents.store.prefix}"
