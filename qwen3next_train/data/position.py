"""The data position of a run whose data changes on the way: where each source of the present blend goes on.

While nothing changes, the number of samples taken is the whole position, and every source begins at row 0. When the
sources, their weights, the row length or the seed change at a resume, a new blend begins at sample 0, and each
source in it goes on where the one before left it, so that nothing is repeated or passed over:

* its rows are the same as before (same documents, row length and seed): at the next row that was not taken;
* its rows are cut or shuffled otherwise: at the beginning of its next epoch, since rows of two lengths have no common
  order; what was left of the epoch is not read;
* it is new: at its first row. One that was dropped is remembered, should it come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

from qwen3next_train.config.schema import Config
from qwen3next_train.data.blend import Blend
from qwen3next_train.data.digests import digest_of
from qwen3next_train.data.prepared import PreparedData, PreparedSource
from qwen3next_train.data.rows import rows_per_epoch

_Count = Annotated[int, Field(ge=0, lt=2**62, strict=True)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SourcePosition:
    """Where one source goes on when a blend begins.

    Args:
        content: digest of its documents, as tokens.
        order: number that selects its shuffling, kept when sources are added, dropped or moved.
        first_row: rows since the start of training that come before the blend's first row of it.
        sequence_length: tokens of those rows.
        seed: that they are shuffled by.
    """

    content: Annotated[str, Strict()]
    order: _Count
    first_row: _Count
    sequence_length: Annotated[int, Field(gt=0, lt=2**62, strict=True)]
    seed: _Count


@dataclasses.dataclass(frozen=True)
class DataStart:
    """Where a blend begins.

    Args:
        sources: those of the blend, in its order.
        former: those that earlier blends had and this one has not.
        lines: what becomes of each source, for people.
    """

    sources: tuple[SourcePosition, ...]
    former: tuple[SourcePosition, ...] = ()
    lines: tuple[str, ...] = ()


def new_start(prepared: PreparedData, *, sequence_length: int, seed: int) -> DataStart:
    """Every source at its first row."""
    return DataStart(
        tuple(
            SourcePosition(
                content=content_of(source),
                order=index,
                first_row=0,
                sequence_length=sequence_length,
                seed=seed,
            )
            for index, source in enumerate(prepared.train)
        )
    )


def content_of(source: PreparedSource) -> str:
    """Digest of a source's documents, wherever they lie and whatever their weight."""
    return digest_of(source.fingerprint, source.documents.documents.start, source.documents.documents.stop)


def is_same_stream(
    sources: Sequence[SourcePosition], weights: Sequence[float], prepared: PreparedData, config: Config
) -> bool:
    """Whether the samples that follow are those of the blend that ``sources`` and ``weights`` describe."""
    wanted = [(content_of(source), config.data.sequence_length, config.run.seed) for source in prepared.train]
    found = [(source.content, source.sequence_length, source.seed) for source in sources]
    return found == wanted and _shares(weights) == _shares([source.weight for source in prepared.train])


def change_start(
    before: DataStart, weights: Sequence[float], consumed_samples: int, prepared: PreparedData, config: Config
) -> DataStart:
    """Where the blend of ``prepared`` and ``config`` begins.

    Args:
        before: where the present blend began; without sources when that is not known, and then all count as new.
        weights: of its sources.
        consumed_samples: samples taken of it.
        prepared: the sources from now on.
        config: the configuration from now on.
    """
    known = list(before.former)
    if before.sources:
        taken = Blend(weights, seed=before.sources[0].seed).counts_before(consumed_samples)
        known = [
            dataclasses.replace(source, first_row=source.first_row + count)
            for source, count in zip(before.sources, taken, strict=True)
        ] + known
    # Of a checkpoint that does not say its sources, their number at least.
    next_order = max((source.order for source in known), default=len(weights) - 1) + 1
    sources, lines = [], []
    for source in prepared.train:
        content = content_of(source)
        earlier = next((position for position in known if position.content == content), None)
        if earlier is None:
            earlier = SourcePosition(
                content=content,
                order=next_order,
                first_row=0,
                sequence_length=config.data.sequence_length,
                seed=config.run.seed,
            )
            next_order += 1
            position, line = earlier, f"begins at row 0 of {_num_rows(source, config):,}"
        else:
            known.remove(earlier)
            position, line = _continued(earlier, source, config)
        sources.append(position)
        lines.append(f"{source.label}: {line}")
    return DataStart(tuple(sources), tuple(known), tuple(lines))


def _continued(earlier: SourcePosition, source: PreparedSource, config: Config) -> tuple[SourcePosition, str]:
    length, seed = config.data.sequence_length, config.run.seed
    num_rows = _num_rows(source, config)
    if (earlier.sequence_length, earlier.seed) == (length, seed):
        epoch, row = divmod(earlier.first_row, num_rows)
        return earlier, f"goes on at row {row:,} of {num_rows:,} of epoch {epoch}"
    old_rows = rows_per_epoch(source.documents.num_tokens, earlier.sequence_length)
    epoch, row = divmod(earlier.first_row, old_rows)
    left = ""
    if row:
        epoch += 1
        left = f"; {old_rows - row:,} of {old_rows:,} rows of epoch {epoch - 1} are left out"
    position = dataclasses.replace(earlier, first_row=epoch * num_rows, sequence_length=length, seed=seed)
    return position, f"goes on at row 0 of {num_rows:,} of epoch {epoch}{left}"


def _num_rows(source: PreparedSource, config: Config) -> int:
    return rows_per_epoch(source.documents.num_tokens, config.data.sequence_length)


def _shares(weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]
