"""Which checkpoint is the best by a validation metric (``checkpoint.best``).

Every manifest says what a validation at its step found, and is hashed as a whole, so nothing else has to be kept or can
be damaged: the file ``best`` beside the checkpoints is for people, made again at every save, and never read.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.checkpoint.discovery import verify
from qwen3next_train.checkpoint.filesystem import Filesystem
from qwen3next_train.checkpoint.manifest import Manifest
from qwen3next_train.checkpoint.names import CheckpointInfo
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.metric_names import prefix_of


@dataclass(frozen=True)
class Rated:
    """A checkpoint and what a validation at its step found.

    Args:
        checkpoint: which one.
        metric: of the validation.
        value: of the metric; lower is better.
    """

    checkpoint: CheckpointInfo
    metric: str
    value: float


@dataclass(frozen=True)
class Rating:
    """What a state is worth by a metric.

    Args:
        value: of the metric.
        rows: digest of the rows it was found on; values of other rows do not compare.
    """

    value: float
    rows: str


def rating(state: TrainState, metric: str) -> Rating | None:
    """By a metric; None where no validation found a value, or while steps were being skipped."""
    if state.consecutive_skips or metric not in state.validation:
        return None
    return Rating(state.validation[metric], state.validation_rows.get(prefix_of(metric), ""))


def ranked(
    fs: Filesystem,
    directory: Path,
    checkpoints: Iterable[CheckpointInfo],
    metric: str,
    known: MutableMapping[str, Rating | None] | None = None,
) -> list[Rated]:
    """The checkpoints that have a value of ``metric``, the lowest first; of equal ones the older first.

    Where a resume has changed what is validated on, those that looked at the rows of the newest of them.

    Files are not hashed: whether the best is intact shows when it is verified.

    Args:
        fs: where they are.
        directory: the checkpoints directory.
        checkpoints: which ones.
        metric: of a validation.
        known: ratings by name, of manifests that need not be read again; others are added.
    """
    ratings = {} if known is None else known
    found: list[tuple[CheckpointInfo, Rating]] = []
    for checkpoint in checkpoints:
        if checkpoint.name not in ratings:
            manifest = _manifest(fs, directory, checkpoint)
            ratings[checkpoint.name] = None if manifest is None else rating(manifest.train_state, metric)
        if (own := ratings[checkpoint.name]) is not None:
            found.append((checkpoint, own))
    if not found:
        return []
    _, newest = max(found, key=lambda pair: pair[0].step)
    comparable = [Rated(checkpoint, metric, own.value) for checkpoint, own in found if own.rows == newest.rows]
    return sorted(comparable, key=lambda rated: (rated.value, rated.checkpoint.step))


def best_of(fs: Filesystem, directory: Path, checkpoints: Iterable[CheckpointInfo]) -> Rated | None:
    """The best by the metric that the newest checkpoint's configuration names.

    Args:
        fs: where they are.
        directory: the checkpoints directory.
        checkpoints: of a run, newest first.

    Returns:
        None when no metric is named, or no checkpoint has a value of it.
    """
    published = [checkpoint for checkpoint in checkpoints if checkpoint.published]
    manifests = (_manifest(fs, directory, checkpoint) for checkpoint in published)
    newest = next((manifest for manifest in manifests if manifest is not None), None)
    section = None if newest is None else newest.config.get("checkpoint")
    metric = section.get("best") if isinstance(section, dict) else None
    if not isinstance(metric, str) or not metric:
        return None
    return next(iter(ranked(fs, directory, published, metric)), None)


def _manifest(fs: Filesystem, directory: Path, checkpoint: CheckpointInfo) -> Manifest | None:
    """None where the checkpoint is not whole, or not to be read now."""
    result = verify(fs, directory, checkpoint, hashes=False)
    return result.manifest if result.reason is None else None
