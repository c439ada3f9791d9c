"""Validation during training: what each set says, the lowest value so far, and when it is too long ago."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.train_state import Lowest, TrainState
from qwen3next_train.config.metric_names import prefix_of, validation_prefix
from qwen3next_train.config.schema import Config
from qwen3next_train.data.validation import ValidationData
from qwen3next_train.engine.base import Engine
from qwen3next_train.errors import ConfigError
from qwen3next_train.log import get_logger
from qwen3next_train.row_slices import RowSlice
from qwen3next_train.topology import Topology


@dataclass(frozen=True)
class ValidationSet:
    """One set's share of this rank.

    Args:
        prefix: of its metrics, ``eval/`` or ``eval/NAME/``.
        batches: this rank's micro-batches, as many as every other rank's.
        bytes_per_token: of its text, None where unknown (no bits per byte then).
        rows: digest of the set's rows, on all ranks the same.
    """

    prefix: str
    batches: Sequence[PackedBatch]
    bytes_per_token: float | None
    rows: str


def check_metrics(data: Mapping[str, ValidationData], config: Config) -> None:
    """Check that what the run goes by can be computed.

    Args:
        data: the validation sets by name.
        config: the resolved configuration.

    Raises:
        ConfigError: a metric needs the bytes of a text, which nobody knows.
    """
    by_metric = {"checkpoint.best": config.checkpoint.best}
    if config.eval.patience:
        by_metric["eval.patience_metric"] = config.eval.patience_metric
    for name, rows in data.items():
        for key, metric in by_metric.items():
            if metric == f"{validation_prefix(name)}bpb" and rows.unsized_source:
                raise ConfigError(
                    f"{key} {metric}: nobody knows how many bytes the text of {rows.unsized_source} has (token ids, or "
                    f"a part of a token store); choose {validation_prefix(name)}loss"
                )


def validation_sets(
    data: Mapping[str, ValidationData], config: Config, topology: Topology, part: RowSlice
) -> list[ValidationSet]:
    """This rank's share of each set.

    Args:
        data: the sets by name.
        config: the resolved configuration.
        topology: this rank's place.
        part: this rank's slice of every row.

    Raises:
        ConfigError: see :func:`check_metrics`.
        DataError: a store is damaged.
    """
    check_metrics(data, config)
    return [
        ValidationSet(
            validation_prefix(name),
            rows.batches(
                topology,
                micro_batch_size=config.run.micro_batch_size,
                mtp_depths=config.model.mtp_num_layers,
                part=part,
            ),
            rows.bytes_per_token,
            rows.digest,
        )
        for name, rows in data.items()
    ]


def validate(engine: Engine, sets: Sequence[ValidationSet]) -> dict[str, float]:
    """Metrics of all sets. Collective."""
    metrics = {}
    for each in sets:
        loss, _ = engine.eval_loss(each.batches)
        metrics[f"{each.prefix}loss"] = loss
        if each.bytes_per_token is not None:
            metrics[f"{each.prefix}bpb"] = loss / math.log(2) / each.bytes_per_token
    return metrics


def without_other_rows(state: TrainState, sets: Sequence[ValidationSet]) -> TrainState:
    """The state that a run begins with, without a lowest value of other rows than it looks at from now on.

    Args:
        state: of the checkpoint.
        sets: of the run.
    """
    before = state.validation_rows
    for each in sets:
        if before.get(each.prefix, each.rows) != each.rows:
            get_logger().info(
                "%sloss: of other rows than before; checkpoint.best and eval.patience go by validations from now on",
                each.prefix,
            )
    if state.lowest is None:
        return state
    prefix = prefix_of(state.lowest.metric)
    is_same = any(each.prefix == prefix and before.get(prefix) == each.rows for each in sets)
    return state if is_same else replace(state, lowest=None)


def with_validation(
    state: TrainState, metrics: Mapping[str, float], sets: Sequence[ValidationSet], config: Config
) -> TrainState:
    """The state after a validation of ``sets`` at its step."""
    lowest = None
    if config.eval.patience:
        metric = config.eval.patience_metric
        lowest = _lowest(state.lowest, metric, metrics[metric], state.step)
    found = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return replace(state, validation=found, validation_rows={each.prefix: each.rows for each in sets}, lowest=lowest)


def end_for_want_of_progress(state: TrainState, config: Config) -> str | None:
    """Why a run ends early, in one line; None while it does not."""
    patience = config.eval.patience
    if not patience:
        return None
    lowest = _of_metric(state.lowest, config.eval.patience_metric)
    if lowest is None or lowest.num_since < patience:
        return None
    best = "no finite value" if lowest.value is None else f"{lowest.value:.4f} at step {lowest.step}"
    return (
        f"ended at step {state.step}: {lowest.num_since} validations in a row without a new lowest {lowest.metric} "
        f"(eval.patience {patience}), which was {best}"
    )


def _lowest(before: Lowest | None, metric: str, value: float, step: int) -> Lowest:
    before = _of_metric(before, metric)
    if math.isfinite(value) and (before is None or before.value is None or value < before.value):
        return Lowest(metric=metric, value=value, step=step, num_since=0)
    if before is None:
        return Lowest(metric=metric, value=None, step=step, num_since=1)
    return replace(before, num_since=before.num_since + 1)


def _of_metric(lowest: Lowest | None, metric: str) -> Lowest | None:
    """Nothing is known of a metric that an earlier attempt did not look at."""
    return lowest if lowest is not None and lowest.metric == metric else None
