"""The schema as data: every key with type, default and description; configurations as YAML, hash and difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qwen3next_train.config.batch_size import BATCH_KEYS, levels_after
from qwen3next_train.config.curve import CURVE_KEYS, curve_after, decay_span
from qwen3next_train.config.schema import Config, ScheduleConfig, SourceConfig
from qwen3next_train.config.strict_yaml import Value, dump_yaml
from qwen3next_train.config.validate import expand_interval

_HARMLESS_PREFIXES = ("logging.", "checkpoint.", "eval.", "kernels.", "parallel.")
_HARMLESS_KEYS = frozenset(
    (
        *("run.dir", "run.device", "run.micro_batch_size", "run.max_skipped_steps", "run.peer_timeout_s"),
        *("data.cache_dir", "data.num_prefetch_steps", "data.validation_sets"),
        # How state is kept, as a layout is; a checkpoint holds fp32 and a switch is logged.
        "optimizer.moments_dtype",
        # Read when a change is accepted; what it came to is part of the state then.
        *("schedule.rewarmup_steps", "schedule.rewarmup_from"),
    )
)
_SHAPE_KEYS = frozenset(
    f"model.{name}"
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "layer_types", "tie_word_embeddings", "mtp_num_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_output_gate"),
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
        *("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_expert_gate"),
    )
)
_START_KEY = "checkpoint.init_from"
# Decide what a run starts from, and are not read any more once it has a checkpoint.
_START_KEYS = frozenset((_START_KEY, "model.initializer_range", "model.linear_dt_init"))
# layer_types says the same and is always explicit in a resolved configuration.
_DERIVED_KEYS = frozenset(("model.full_attention_interval",))


@dataclass(frozen=True)
class Key:
    """One setting of the schema.

    Args:
        name: dotted name, ``section.key``.
        annotation: the Python type of its value.
        type_text: the type in words, bounds included.
        hint: what to do when the value is wrong: ``give a whole number > 0``.
        default: default as ``--help`` shows it.
        description: one line.
    """

    name: str
    annotation: Any
    type_text: str
    hint: str
    default: str
    description: str


@dataclass(frozen=True)
class Change:
    """One setting that differs between two configurations."""

    key: str
    old: object
    new: object


@dataclass(frozen=True)
class ConfigChanges:
    """What differs, by what it does to a run that is resumed.

    Args:
        harmless: does not change what is computed at a step (logging, paths, layout, backends).
        trajectory: the run would go on differently (learning rate, data, seed, losses).
        shape: the checkpoint's tensors do not fit the model.
    """

    harmless: tuple[Change, ...]
    trajectory: tuple[Change, ...]
    shape: tuple[Change, ...]


def sections() -> Iterator[tuple[str, str]]:
    """Top-level sections and their descriptions."""
    for name, field in Config.model_fields.items():
        yield name, field.description or ""


@cache
def keys() -> Mapping[str, Key]:
    """Every setting by dotted name, in the schema's order."""
    return {key.name: key for key in _keys_of(Config, "")}


@cache
def subsections() -> frozenset[str]:
    """Dotted names that hold keys of their own (``run``, ``logging.wandb``)."""
    names: set[str] = set()
    for key in keys():
        parts = key.split(".")
        names.update(".".join(parts[:count]) for count in range(1, len(parts)))
    return frozenset(names)


def hint_at(location: tuple[int | str, ...]) -> str:
    """What a wrong value at a place in the schema (pydantic's ``loc``, list indices included) should become."""
    annotation: Any = Config
    field: FieldInfo | None = None
    for part in location:
        if get_origin(annotation) is dict:
            annotation, field = get_args(annotation)[1], None
        elif isinstance(part, int):
            annotation, field = get_args(annotation)[0], None
            if get_origin(annotation) is Annotated:
                annotation = get_args(annotation)[0]
        else:
            field = annotation.model_fields[part]
            annotation = field.annotation
    return _hint(annotation, field)


def to_yaml(config: Config, *, include: Mapping[str, Any] | None = None) -> str:
    """The resolved configuration as YAML that loads to the identical :class:`Config`.

    Args:
        config: the configuration, ``model.layer_types`` filled in.
        include: the sections and keys to write, as pydantic's ``model_dump`` takes them; None for all.
    """
    tree = config.model_dump(include=None if include is None else dict(include))
    model = config.model
    if expand_interval(model.full_attention_interval, model.num_hidden_layers) != model.layer_types:
        # No interval describes this pattern; layer_types alone does.
        del tree["model"]["full_attention_interval"]
    return dump_yaml(tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested sections to ``{"section.key": value}``; unknown keys stay as they are."""
    flat: dict[str, Value] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in subsections() and isinstance(value, Mapping):
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def config_hash(config: Config) -> str:
    """SHA-256 over the settings that decide the trajectory: equal hashes, equal runs.

    Harmless settings (see :class:`ConfigChanges`) do not enter, so moving a run directory or logging more
    often keeps the hash.
    """
    flat = flatten(config.model_dump(mode="json"))
    relevant = {key: value for key, value in flat.items() if _class_of(key, config.schedule) != "harmless"}
    relevant = {key: _without_alias(value) for key, value in relevant.items() if key not in _DERIVED_KEYS}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def compare_configs(old: Mapping[str, Any], new: Config, *, step: int | None = None) -> ConfigChanges:
    """Sort what differs between a run directory's ``config.yaml`` and the configuration asked for.

    Args:
        old: the resolved configuration as read from YAML; a key it lacks (written by an earlier version)
            counts as its default, a key that no longer exists as harmless.
        new: the resolved configuration asked for.
        step: step the run resumes at, 0 without a checkpoint, None when unknown. What is compared of the learning rate
            are the rates of the steps after it, not the settings that say them. A ``wsd`` schedule has no memory of
            ``run.steps`` until its final decay begins, so a longer or shorter run is harmless before that. What only
            the first weights depend on is harmless after step 0.

    Returns:
        The differing settings in the schema's order.
    """
    old_flat, new_flat = flatten(old), flatten(new.model_dump())
    defaults = flatten(Config().model_dump())
    found: dict[str, list[Change]] = {"harmless": [], "trajectory": [], "shape": []}
    before = {key: _with_source_defaults(old_flat.get(key, defaults[key])) for key in new_flat}
    differing = [
        key
        for key, value in new_flat.items()
        if key not in _DERIVED_KEYS and _without_alias(before[key]) != _without_alias(value)
    ]
    decisive = {
        key
        for group, outcome in ((CURVE_KEYS, curve_after), (BATCH_KEYS, levels_after))
        for key in _changes_of(outcome, before, new, [key for key in group if key in differing], step)
    }
    for key in differing:
        kind = _class_of(key, new.schedule)
        if key in CURVE_KEYS or key in BATCH_KEYS:
            kind = "trajectory" if key in decisive else "harmless"
        if key in _START_KEYS and step:
            kind = "harmless"
        found[kind].append(Change(key, before[key], new_flat[key]))
    found["harmless"] += [Change(key, value, None) for key, value in old_flat.items() if key not in new_flat]
    return ConfigChanges(**{kind: tuple(changes) for kind, changes in found.items()})


def _changes_of(
    outcome: Callable[[Config, int], object],
    before: Mapping[str, Any],
    new: Config,
    keys: Sequence[str],
    step: int | None,
) -> set[str]:
    """Those of the differing ``keys`` that what they come to after ``step``, rates or batches, differs by.

    A key that can go back without a difference is none of them, so what says the same in other words is not either.
    """
    left = list(keys)
    old = new
    try:
        for key in left:
            old = _with_value(old, key, before[key])
    except ValidationError:
        # No configuration of ours: nothing is known of what it came to.
        return set(left)
    done = step or 0
    if outcome(old, done) == outcome(new, done):
        return set()
    current, changed = new, True
    while changed:
        changed = False
        for key in list(left):
            candidate = _with_value(current, key, before[key])
            if outcome(candidate, done) == outcome(current, done) or (
                key == "run.steps" and step is not None and _before_decay((candidate, current), step)
            ):
                left.remove(key)
                current, changed = candidate, True
    return set(left)


def _with_value(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    known = config.model_dump(include={section})[section]
    return config.model_copy(update={section: type(vars(config)[section]).model_validate(known | {name: value})})


def _before_decay(configs: Sequence[Config], step: int) -> bool:
    """Whether no final decay of these has begun at ``step``."""
    if any(config.schedule.kind != "wsd" for config in configs):
        return False
    return all(step <= decay_span(config.schedule, config.run.steps)[0] for config in configs)


def _with_source_defaults(value: Any) -> Any:
    """Sources as an earlier version has stored them, with the keys of this one; any other value as it is."""
    if isinstance(value, dict):
        return {name: _with_source_defaults(item) for name, item in value.items()}
    if not isinstance(value, list) or not all(isinstance(item, dict) and "source" in item for item in value):
        return value
    return [SourceConfig(source="").model_dump() | item for item in value]


def _without_alias(value: Any) -> Any:
    """Sources without what only metrics call them by; any other value as it is."""
    if not isinstance(value, list):
        return value
    return [{key: item[key] for key in item if key != "alias"} if isinstance(item, dict) else item for item in value]


def _class_of(key: str, schedule: ScheduleConfig) -> Literal["harmless", "trajectory", "shape"]:
    if key in _SHAPE_KEYS:
        return "shape"
    if key in _HARMLESS_KEYS or (key.startswith(_HARMLESS_PREFIXES) and key != _START_KEY):
        return "harmless"
    if key == "run.steps" and not _steps_shape_schedule(schedule):
        return "harmless"
    return "trajectory"


def _steps_shape_schedule(schedule: ScheduleConfig) -> bool:
    """Whether the learning rate at a step depends on how many steps follow."""
    if schedule.kind == "constant":
        return False
    return schedule.kind == "wsd" or schedule.decay_steps == 0


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys_of(annotation, f"{prefix}{name}.")
            continue
        yield Key(
            name=prefix + name,
            annotation=annotation,
            type_text=_type_text(annotation, field),
            hint=_hint(annotation, field),
            default=_default_text(field),
            description=field.description or "",
        )


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return "true" if default else "false"
    if default == {}:
        return "{}"
    if isinstance(default, list):
        return "[" + ", ".join(item.source if isinstance(item, SourceConfig) else str(item) for item in default) + "]"
    return "''" if default == "" else str(default)


def _bounds(field: FieldInfo | None) -> str:
    texts = []
    for bound in field.metadata if field else ():
        if isinstance(bound, annotated_types.Gt):
            texts.append(f"> {bound.gt}")
        elif isinstance(bound, annotated_types.Ge):
            texts.append(f">= {bound.ge}")
        elif isinstance(bound, annotated_types.Lt):
            texts.append(f"< {bound.lt}")
        elif isinstance(bound, annotated_types.Le):
            texts.append(f"<= {bound.le}")
    return " and ".join(texts)


def _type_text(annotation: Any, field: FieldInfo | None = None) -> str:
    if get_origin(annotation) is Annotated:
        # An entry of a list has no field that its constraints were moved to.
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return "list of " + ("sources" if isinstance(item, type) and issubclass(item, BaseModel) else _type_text(item))
    if get_origin(annotation) is dict:
        return f"mapping of names to a {_type_text(get_args(annotation)[1])} each"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping of " + ", ".join(annotation.model_fields)
    name = {int: "whole number", float: "number", bool: "true|false", str: "text", NoneType: "null"}[annotation]
    return f"{name} {_bounds(field)}".strip()


def _hint(annotation: Any, field: FieldInfo | None) -> str:
    text = _type_text(annotation, field)
    if get_origin(annotation) is Literal:
        return (
            "give " + ("one of " if len(get_args(annotation)) > 1 else "") + ", ".join(map(str, get_args(annotation)))
        )
    if annotation is bool:
        return "give true or false"
    if annotation is str:
        return "give text, in quotes if it looks like a number"
    return f"give a {text}"
