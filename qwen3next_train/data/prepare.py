"""Turns configured sources into opened token stores: tokenises once, splits, checks that all belongs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from pydantic import TypeAdapter, ValidationError

from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data.digests import digest_files, digest_of, digest_store
from qwen3next_train.data.documents import is_cut
from qwen3next_train.data.left_out import LeftOuts, format_left_out
from qwen3next_train.data.prepared import PreparedData, PreparedSource, prepared_source
from qwen3next_train.data.sealed_json import read_sealed, write_sealed
from qwen3next_train.data.seen_text import warn_of_seen_text
from qwen3next_train.data.sources import FileSource, StoreSource, format_passed_over, resolve
from qwen3next_train.data.store_builder import build_stores
from qwen3next_train.data.store_cache import default_cache_dir, get_or_build
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.data.tokenization import Tokenizer
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.log import get_logger

FORMAT_VERSION = 4
"""Part of the cache's keys: raise it when the same sources would be tokenised or split differently."""

CHECKED_AT_START_BYTES = 4 << 30
"""Of tokens and indices that are compared with their hashes before the first step: some seconds. What is beyond is
checked as it is read, block by block, so that a run over terabytes starts at once."""

_LEFT_OUT_NAME = "left_out.json"
_MAX_LEFT_OUT_BYTES = 1 << 18
_LEFT_OUTS = TypeAdapter(LeftOuts)

_Found: TypeAlias = tuple[SourceConfig, FileSource | StoreSource]
"""A source as configured, and what it is."""


def prepare_stores(config: Config, *, announce: bool = False) -> PreparedData:
    """Open, and where needed first tokenise, all sources of a run. Any number of processes may call it at once.

    Text is split document by document, by hash; of a single text file the end is held out. A token store's held-out
    part is its last documents, a view without copy, as in Megatron-LM's ``--split``.

    Args:
        config: the sources and all they need.
        announce: as of :class:`Preparer`.

    Raises:
        ConfigError: no source is named, or the tokenizer is missing, too large for the model, or not the one that
            made a store.
        DataError: a source is missing, unreadable, damaged or empty.
        StorageError: the cache cannot be written.
    """
    require_sources(config)
    data = config.data
    # All are looked up before the first is tokenised: a misspelt one is said at once, not when hours have passed.
    to_train, to_validate = _look_up(data.sources), _look_up(data.validation_sources)
    to_sets = {name: _look_up(sources) for name, sources in data.validation_sets.items()}
    held_out = {"data.validation_sources": to_validate} | {
        f"data.validation_sets: {name}": sources for name, sources in to_sets.items()
    }
    warn_of_seen_text(
        [resolved for _, resolved in to_train],
        {setting: [resolved for _, resolved in sources] for setting, sources in held_out.items()},
    )
    preparer = Preparer(config, announce=announce)
    fraction = 0.0 if to_validate else data.validation_fraction
    pairs = [preparer.prepare(source, fraction) for source in to_train]
    if to_validate:
        validation = [preparer.prepare(source, 0.0)[0] for source in to_validate]
    else:
        validation = [held_out for _, held_out in pairs if held_out is not None]
    sets = {name: tuple(preparer.prepare(source, 0.0)[0] for source in sources) for name, sources in to_sets.items()}
    return preparer.collect([train for train, _ in pairs], validation, sets)


def prepare_evaluation(config: Config, source: SourceConfig) -> PreparedData:
    """Prepare one source to be evaluated whole: everything is in ``validation``, and there is no training part.

    How documents end is said before text is tokenised.

    Raises:
        ConfigError: as :func:`prepare_stores`.
        DataError: as :func:`prepare_stores`.
        StorageError: as :func:`prepare_stores`.
    """
    preparer = Preparer(config, announce=True)
    return preparer.collect([], [preparer.prepare(found, 0.0)[0] for found in _look_up([source])])


def require_sources(config: Config) -> None:
    """Reject a run without data; a configuration may leave it open until then, as shipped ones do.

    Raises:
        ConfigError: there is no source.
    """
    if not config.data.sources:
        raise ConfigError(
            "data.sources: no source (got []); name your text and its tokenizer, such as "
            "--data.sources 'corpus/*.parquet' --data.tokenizer path/to/tokenizer.json"
        )


def cache_dir_of(config: Config) -> Path:
    """Where tokenised text is kept."""
    data = config.data
    return Path(data.cache_dir) if data.cache_dir else default_cache_dir()


def _look_up(sources: Sequence[SourceConfig]) -> list[_Found]:
    return [(source, resolve(source)) for source in sources]


class Preparer:
    """Prepares single sources of one configuration; reads the tokenizer when the first text needs it.

    Args:
        config: tokenizer, model and cache.
        announce: say the tokenizer and how documents end once the first text is found, before it is tokenised; for
            commands that do not say it with their data.
    """

    def __init__(self, config: Config, *, announce: bool = False) -> None:
        self._config = config
        self._announce = announce
        self._cache_dir = cache_dir_of(config)
        self._tokenizer: Tokenizer | None = None
        self._unchecked_bytes = CHECKED_AT_START_BYTES

    @property
    def tokenizer(self) -> Tokenizer:
        """The configured tokenizer.

        Raises:
            ConfigError: it cannot be used, or has more ids than the model.
        """
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

    def prepare(self, found: _Found, held_out_fraction: float) -> tuple[PreparedSource, PreparedSource | None]:
        """Training and held-out part of one source.

        Raises:
            ConfigError: as :func:`prepare_stores`.
            DataError: as :func:`prepare_stores`.
            StorageError: as :func:`prepare_stores`.
        """
        source, resolved = found
        if isinstance(resolved, FileSource):
            log_passed_over(resolved)
            return self._prepare_files(source, resolved, held_out_fraction)
        store = TokenStore(resolved.prefix)
        self._check(store)
        num_held_out = int(store.num_documents * held_out_fraction)
        fingerprint = digest_store(store)
        num_train = store.num_documents - num_held_out
        train = prepared_source(source, store, fingerprint, documents=range(num_train))
        if not num_held_out:
            return train, None
        held_out = range(num_train, store.num_documents)
        return train, prepared_source(source, store, fingerprint, documents=held_out)

    def log_tokenizer(self) -> None:
        """Say the tokenizer and how documents end.

        Raises:
            ConfigError: the tokenizer cannot be used.
        """
        get_logger().info("%s", self.tokenizer.describe(self._config.model.vocab_size))

    def key(self, files: FileSource, *how: str) -> str:
        """Digest of everything that the stores of these files depend on, ``how`` they are split included.

        Raises:
            ConfigError: the tokenizer cannot be used.
            DataError: a file is missing.
            StorageError: a file or what is known of its content cannot be read now.
        """
        fingerprint = self.tokenizer.fingerprint
        return digest_of(
            FORMAT_VERSION, fingerprint, *how, files.text_field, digest_files(files.files, self._cache_dir)
        )

    def build(
        self, files: FileSource, train_prefix: Path, held_out_fraction: float, key: str
    ) -> tuple[float, LeftOuts]:
        """Tokenise files into the stores of the entry ``key``, the held-out one beside the training one.

        Returns:
            The seconds it took, and how many documents were left out, by reason.

        Raises:
            ConfigError: the tokenizer cannot be used.
            DataError: a document is broken, or there are none.
            StorageError: a file, or what was written before, cannot be read now.
            OSError: writing fails.
        """
        left_out: LeftOuts = {}
        build_s = build_stores(
            files,
            self.tokenizer,
            train_prefix=train_prefix,
            validation_prefix=train_prefix.with_name("validation"),
            held_out_fraction=held_out_fraction,
            skipped=left_out,
            entry=key,
        )
        return build_s, left_out

    def collect(
        self,
        train: Sequence[PreparedSource],
        validation: Sequence[PreparedSource],
        sets: Mapping[str, tuple[PreparedSource, ...]] | None = None,
    ) -> PreparedData:
        """Check that one tokenizer made all ids, as far as that is known, and bundle the sources.

        Raises:
            ConfigError: several did.
        """
        sets = sets or {}
        sources = (*train, *validation, *chain.from_iterable(sets.values()))
        known = {source.tokenizer_fingerprint: source.label for source in sources}
        known.pop(None, None)
        if len(known) > 1:
            raise ConfigError(
                f"sources tokenised with different tokenizers: {', '.join(sorted(known.values()))}; "
                "tokenize all with the same data.tokenizer"
            )
        eos_token_id = None if self._tokenizer is None else self._tokenizer.eos_token_id
        vocab_size = self._config.model.vocab_size
        described = "" if self._tokenizer is None else self._tokenizer.describe(vocab_size)
        return PreparedData(tuple(train), tuple(validation), eos_token_id, vocab_size, described, sets)

    def _prepare_files(
        self, source: SourceConfig, files: FileSource, fraction: float
    ) -> tuple[PreparedSource, PreparedSource | None]:
        key = self.key(files, repr(fraction), *(["cut"] if is_cut(files, fraction) else []))
        if self._announce:
            self._announce = False
            self.log_tokenizer()

        def build(directory: Path) -> float:
            build_s, left_out = self.build(files, directory / "train", fraction, key)
            write_sealed(directory / _LEFT_OUT_NAME, _LEFT_OUTS.dump_python(left_out))
            return build_s

        def check(store: TokenStore) -> None:
            _read_left_out(store)
            self._check(store)

        cached = get_or_build(self._cache_dir, key, source.source, build, check)
        left_out = _read_left_out(cached.train)
        log_left_out(files, left_out)

        def part(name: str, store: TokenStore) -> PreparedSource:
            found = prepared_source(source, store, f"{key}/{name}", build_s=cached.build_s)
            return replace(found, passed_over=files.passed_over, left_out=left_out)

        return (
            part("train", cached.train),
            None if cached.validation is None else part("validation", cached.validation),
        )


def log_passed_over(files: FileSource) -> None:
    """Say which files of a folder or glob are not read."""
    if files.passed_over:
        get_logger().info("%s: %d files read, %s", files.label, len(files.files), format_passed_over(files.passed_over))


def log_left_out(files: FileSource, left_out: LeftOuts) -> None:
    """Say how many documents were left out, by reason."""
    if left_out:
        get_logger().info("%s: left out %s", files.label, format_left_out(left_out))


def _read_left_out(store: TokenStore) -> LeftOuts:
    """What :func:`build_stores` left out when the store of the cache was made.

    Raises:
        DataError: that is not known any more.
        StorageError: it cannot be read now.
    """
    path = store.prefix.with_name(_LEFT_OUT_NAME)
    try:
        return _LEFT_OUTS.validate_python(read_sealed(path, max_bytes=_MAX_LEFT_OUT_BYTES))
    except ValidationError:
        raise DataError(f"{path}: missing or damaged") from None
