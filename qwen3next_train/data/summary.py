"""What a run reads of each source: documents, tokens, share of the samples, passes over it, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3next_train.config.batch_size import samples_through
from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data.formats import Format, format_of
from qwen3next_train.data.prepared import PreparedData, PreparedSource
from qwen3next_train.data.sources import FileSource, resolve_local
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import TrainError
from qwen3next_train.log import get_logger

MAX_EPOCHS = 4.0
"""Up to this many passes repeated text is worth about as much as new text (Muennighoff et al. 2023,
arXiv:2305.16264)."""

_BYTES_PER_TOKEN = 4.0
"""Of usual text and tokenizers; what a plan assumes of text that is not tokenised yet."""

_COMPRESSION = 3.0
"""Bytes of usual text in one stored byte of a compressed file or a parquet file."""


@dataclass(frozen=True)
class SourceUse:
    """One training source in a run.

    Args:
        label: the source as the user wrote it.
        share: of the samples, 0 to 1.
        num_tokens: tokens of one pass; None when unknown.
        epochs: passes over the source in the whole run; None when unknown.
    """

    label: str
    share: float
    num_tokens: int | None
    epochs: float | None


def uses_of(config: Config, num_tokens: Sequence[int | None]) -> list[SourceUse]:
    """How a run uses its sources.

    Args:
        config: steps, batch, row length, sources and weights.
        num_tokens: of each training source, None where unknown.
    """
    total = sum(source.weight for source in config.data.sources)
    num_consumed = samples_through(config, config.run.steps) * config.data.sequence_length
    uses = []
    for source, tokens in zip(config.data.sources, num_tokens, strict=True):
        share = source.weight / total
        uses.append(SourceUse(source.source, share, tokens, share * num_consumed / tokens if tokens else None))
    return uses


def planned_uses(config: Config) -> list[SourceUse]:
    """How a run will use its sources, before they are tokenised: tokens of text are estimated from the files' sizes.

    What is not on this machine, such as a dataset of the Hugging Face hub, is unknown.
    """
    return uses_of(config, [_estimated_tokens(source) for source in config.data.sources])


def _estimated_tokens(source: SourceConfig) -> int | None:
    with suppress(TrainError, OSError, ValueError):
        found = resolve_local(source)
        if isinstance(found, FileSource):
            return int(sum(_text_bytes(file.path) for file in found.files) / _BYTES_PER_TOKEN)
        return None if found is None else TokenStore(found.prefix).num_tokens
    return None


def _text_bytes(path: Path) -> float:
    file_format = format_of(path.name)
    is_packed = file_format is not None and (file_format.compression is not None or file_format.kind is Format.PARQUET)
    return path.stat().st_size * (_COMPRESSION if is_packed else 1.0)


def use_lines(uses: Sequence[SourceUse]) -> list[str]:
    """Planned uses, one a line."""
    return [
        f"{use.label}: {'tokens unknown' if use.num_tokens is None else f'about {use.num_tokens:,} tokens'}, "
        f"{use.share:.1%} of the samples, {format_epochs(use.epochs)} epochs"
        for use in uses
    ]


def uses_as_json(uses: Sequence[SourceUse]) -> list[dict[str, Any]]:
    """Planned uses as ``plan --json`` reports them; what is unknown is null."""
    return [{"source": use.label, "share": use.share, "tokens": use.num_tokens, "epochs": use.epochs} for use in uses]


def planned_sets(config: Config) -> dict[str, int | None]:
    """Tokens of each named validation set, estimated as in :func:`planned_uses`; None where unknown."""
    sets = {}
    for name, sources in config.data.validation_sets.items():
        tokens = [_estimated_tokens(source) for source in sources]
        sets[name] = None if None in tokens else sum(filter(None, tokens))
    return sets


def set_lines(sets: Mapping[str, int | None]) -> list[str]:
    """Planned validation sets, one a line."""
    return [
        f"validation set {name}: {'tokens unknown' if tokens is None else f'about {tokens:,} tokens'}"
        for name, tokens in sets.items()
    ]


def warn_of_epochs(uses: Sequence[SourceUse]) -> list[str]:
    """A line for each source that is repeated more often than :data:`MAX_EPOCHS` times."""
    return [
        f"{use.label}: {format_epochs(use.epochs)} epochs, more than {MAX_EPOCHS:.0f}; add data, lower run.steps or "
        "the source's weight"
        for use in uses
        if use.epochs is not None and use.epochs > MAX_EPOCHS
    ]


def format_epochs(epochs: float | None) -> str:
    """Passes for people: ``0.027``, ``1.3``, ``1,206``."""
    if epochs is None:
        return "unknown"
    if epochs >= 10:
        return f"{epochs:,.0f}"
    return f"{epochs:.1f}" if epochs >= 1 else f"{epochs:.2g}"


def data_lines(prepared: PreparedData, config: Config) -> list[str]:
    """The sources of a run, one a line: documents, tokens, weight, epochs; their held-out parts; validation sets."""
    uses = uses_of(config, [source.documents.num_tokens for source in prepared.train])
    lines = [
        f"{source.label}: {_size(source)}, weight {source.weight:g} ({use.share:.1%}), "
        f"{format_epochs(use.epochs)} epochs"
        for source, use in zip(prepared.train, uses, strict=True)
    ]
    lines += [f"{source.label}: {_size(source)} held out" for source in prepared.validation]
    return lines + [f"validation set {name}: {_size(*sources)}" for name, sources in prepared.validation_sets.items()]


def log_data(prepared: PreparedData, config: Config) -> None:
    """Say before the first step what the run reads, and warn of sources that are repeated too often."""
    if prepared.tokenizer:
        get_logger().info("%s", prepared.tokenizer)
    for line in data_lines(prepared, config):
        get_logger().info("data: %s", line)
    uses = uses_of(config, [source.documents.num_tokens for source in prepared.train])
    for line in warn_of_epochs(uses):
        get_logger().warning("data: %s", line)


def data_as_json(prepared: PreparedData, config: Config) -> list[dict[str, Any]]:
    """The training sources as ``run.json`` reports them, what was passed over included."""
    uses = uses_of(config, [source.documents.num_tokens for source in prepared.train])
    return [
        {
            "source": source.label,
            "weight": source.weight,
            "share": use.share,
            "documents": len(source.documents.documents),
            "tokens": source.documents.num_tokens,
            "epochs": use.epochs,
            "passed_over": {
                group.reason: {"files": group.num_files, "bytes": group.num_bytes, "example": group.example}
                for group in source.passed_over
            },
            "left_out": {reason: asdict(found) for reason, found in source.left_out.items()},
        }
        for source, use in zip(prepared.train, uses, strict=True)
    ]


def _size(*sources: PreparedSource) -> str:
    num_documents = sum(len(source.documents.documents) for source in sources)
    num_tokens = sum(source.documents.num_tokens for source in sources)
    return f"{num_documents:,} documents, {num_tokens:,} tokens"
