"""The ``tokenize`` subcommand: fills the cache, or writes stores where the user wants them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data.digests import digest_store
from qwen3next_train.data.prepare import (
    Preparer,
    cache_dir_of,
    log_left_out,
    log_passed_over,
    prepare_stores,
    require_sources,
)
from qwen3next_train.data.prepared import PreparedSource, prepared_source
from qwen3next_train.data.sources import FileSource, resolve
from qwen3next_train.data.store_cache import remove_unfinished
from qwen3next_train.data.store_output import is_written, require_unused, write_store
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import ConfigError

_MAX_NAME_BYTES = 200
"""Of an output's name: with what the files beside it append, a name may have 255."""


def tokenize(config: Config, output: Path | None) -> int:
    """Tokenise all sources and print a line for each; return the exit code.

    How documents end is said before the first one is tokenised, after all that is rejected at once.

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
        prepared = prepare_stores(config, announce=True)
        parts = [("train", prepared.train), ("validation", prepared.validation)]
        parts += [(f"validation set {name}", found) for name, found in prepared.validation_sets.items()]
        for part, found in parts:
            for source in found:
                print(_describe(source, part))
        remove_unfinished(cache_dir_of(config))
        return 0
    require_sources(config)
    preparer = Preparer(config)
    data = config.data
    sources = [*data.sources, *data.validation_sources, *chain.from_iterable(data.validation_sets.values())]
    if len(os.fsencode(output.name)) > _MAX_NAME_BYTES:
        raise ConfigError(
            f"--output: a file name of {len(os.fsencode(output.name))} bytes; give one of at most {_MAX_NAME_BYTES}, "
            "so that its files' suffixes have room"
        )
    several = len(sources) > 1
    prefixes = [output.with_name(f"{output.name}_{index:02d}") if several else output for index in range(len(sources))]
    outputs = [_output(preparer, source, prefix) for source, prefix in zip(sources, prefixes, strict=True)]
    # Some are there: an earlier call was interrupted. All are there: it was not, and they are not written again.
    are_written = [is_written(each.prefix, each.key) for each in outputs]
    if all(are_written):
        are_written = [False] * len(outputs)
    for each, is_there in zip(outputs, are_written, strict=True):
        if not is_there:
            require_unused(each.prefix)
    preparer.log_tokenizer()
    for each, is_there in zip(outputs, are_written, strict=True):
        print(_describe(_write(preparer, each, is_there=is_there), "all"))
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


def _output(preparer: Preparer, source: SourceConfig, prefix: Path) -> _Output:
    """What there is to write at ``prefix``."""
    files = resolve(source)
    if not isinstance(files, FileSource):
        raise ConfigError(f"{source.source} is a token store already; name text to tokenize")
    log_passed_over(files)
    return _Output(source, files, prefix, preparer.key(files))


def _write(preparer: Preparer, output: _Output, *, is_there: bool) -> PreparedSource:
    """Tokenise one source into a store of its own, unless it is there."""

    def build(staged: Path) -> float:
        build_s, left_out = preparer.build(output.files, staged, 0.0, output.key)
        log_left_out(output.files, left_out)
        return build_s

    build_s = None if is_there else write_store(output.prefix, output.key, build)
    store = TokenStore(output.prefix)
    return prepared_source(output.source, store, digest_store(store), build_s=build_s)


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
