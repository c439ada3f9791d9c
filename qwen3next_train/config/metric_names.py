"""Names that users give and metrics bear: of validation sets and of training sources.

``metrics/names.py`` lists the metrics; here is which names may stand in them, and which of a validation's metrics a
configuration has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qwen3next_train.config.error_lines import show
from qwen3next_train.config.schema import Config, SourceConfig

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
"""What may stand in a metric's name: no path, pattern or plot legend takes it for anything but a word."""

Problem = tuple[tuple[str, ...], str]
"""Of a configuration: the keys and the message of a ``RuleViolation``."""

_HINT = "give at most 64 letters, digits, '_', '.' and '-', the first a letter or digit"
_MAX_LISTED = 6
_NAME = re.compile(NAME)
_UNUSABLE = re.compile(r"[^A-Za-z0-9_.-]+")
_OWN_LOSSES = frozenset(("lm", "mtp", "load_balancing", "z", "total"))
_POSITION = re.compile(r"position_\d+")


def _is_usable(name: str) -> bool:
    """Whether a validation set or source may be called so."""
    return _NAME.fullmatch(name) is not None


def source_names(config: Config) -> list[str]:
    """Names of the training sources in ``loss/NAME`` and ``data/share_NAME``; empty where a source needs an alias."""
    return [source.alias or _derived_name(source) for source in config.data.sources]


def _is_taken(name: str) -> bool:
    """Whether ``loss/NAME`` is another metric already."""
    return name in _OWN_LOSSES or _POSITION.fullmatch(name) is not None


def validation_metrics(config: Config) -> list[str]:
    """Metrics of this configuration's validations; empty when it has none.

    Bits per byte are there if the bytes of the text are known, which opened sources say.
    """
    return [prefix + kind for prefix in _prefixes(config) for kind in ("loss", "bpb")]


def validation_prefix(name: str) -> str:
    """What the metrics of a validation set begin with; of the one without a name, ``eval/``."""
    return f"eval/{name}/" if name else "eval/"


def prefix_of(metric: str) -> str:
    """The :func:`validation_prefix` of a validation's metric."""
    return metric[: metric.rfind("/") + 1]


def _prefixes(config: Config) -> Iterator[str]:
    if not config.eval.interval:
        return
    if config.data.validation_sources or config.data.validation_fraction:
        yield validation_prefix("")
    yield from map(validation_prefix, config.data.validation_sets)


def _derived_name(source: SourceConfig) -> str:
    """The last part of the source that is no pattern, such as ``corpus`` of ``data/corpus/*.parquet``."""
    parts = [part for part in re.split(r"[/:]", source.source) if part and not set(part) & set("*?[")]
    return _UNUSABLE.sub("-", parts[-1]).lstrip("_.-")[:64] if parts else ""


def name_problems(config: Config) -> Iterator[Problem]:
    """Why names of sets and sources cannot stand in metrics' names."""
    data, key = config.data, "data.validation_sets"
    for name, sources in data.validation_sets.items():
        if not _is_usable(name):
            yield ((key,), f"a set's name cannot stand in a metric's (got {show(name)}); {_HINT}")
        elif not sources:
            yield ((key,), f"the set {name} has no source (got []); name one, or leave the set out")
    for source in data.sources:
        if source.alias and not _is_usable(source.alias):
            yield (("data.sources",), f"an alias cannot stand in a metric's name (got {show(source.alias)}); {_HINT}")
    if "source" not in config.logging.loss_by:
        return
    names = source_names(config)
    for source, name in zip(data.sources, names, strict=True):
        if not _is_usable(name):
            problem = "has nothing to call its metrics by"
        elif _is_taken(name):
            problem = f"would be loss/{name}, which is another metric"
        elif names.count(name) > 1:
            problem = f"would be loss/{name}, like another source"
        else:
            continue
        yield (
            ("logging.loss_by", "data.sources"),
            f"logging.loss_by source: {show(source.source)} {problem}; give its entry of data.sources an alias",
        )


def validation_problems(config: Config) -> Iterator[Problem]:
    """Why the best checkpoint or an early end cannot be told by the metric that is named."""
    checkpoint, validation = config.checkpoint, config.eval
    wanted = {"checkpoint.best": checkpoint.best}
    if validation.patience:
        wanted["eval.patience_metric"] = validation.patience_metric
    known = validation_metrics(config)
    for key, metric in wanted.items():
        if not metric or metric in known:
            continue
        if known:
            text = f"{key} {show(metric)} is no metric of this run's validation; choose one of {_listed(known)}"
            yield ((key,), text)
        else:
            hint = "set eval.interval and name what to validate on (data.validation_sources, data.validation_sets)"
            hint = hint if validation.interval else "set eval.interval"
            yield ((key, "eval.interval"), f"{key} {metric}: the run has no validation; {hint}")
        return
    interval = checkpoint.interval
    if checkpoint.best and (interval == 0 or interval % validation.interval):
        yield (
            ("checkpoint.best", "checkpoint.interval", "eval.interval"),
            f"checkpoint.best {checkpoint.best} needs a validation at every saved step; make checkpoint.interval "
            f"{interval} a multiple of eval.interval {validation.interval}",
        )


def _listed(names: Sequence[str]) -> str:
    """Names for a line; of many the first ones."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
