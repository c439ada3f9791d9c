"""Merges configuration files and command line into one :class:`Config`.

Precedence: model preset < files in order < command line; within one of these, giving a setting under two
names with two values is an error. Every error is one line that names the place it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from qwen3next_train.config import megatron
from qwen3next_train.config.describe import hint_at, keys
from qwen3next_train.config.error_lines import raise_errors, schema_error, show, show_name, unknown_key
from qwen3next_train.config.presets import preset_file
from qwen3next_train.config.renamed import renamed_choice
from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.rule_violation import RuleViolation
from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.config.settings import PRESET_KEY, Origin, Setting, from_command_line, from_file
from qwen3next_train.config.validate import expand_interval, layer_violations, validate, world_violations
from qwen3next_train.errors import ConfigError

_INTERVAL, _PATTERN = "model.full_attention_interval", "model.layer_types"


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration and where each setting came from.

    Args:
        config: resolved: ``model.layer_types`` has one entry per layer.
        origins: by dotted key; settings left at their default are absent.
    """

    config: Config
    origins: Mapping[str, Origin]

    def check_world(self, world_size: int) -> None:
        """Check the rules that need the number of processes.

        Raises:
            ConfigError: one line per broken rule.
        """
        raise_errors([_located(violation, self.origins) for violation in world_violations(self.config, world_size)])


def load_config(files: Sequence[Path], overrides: Sequence[tuple[str, str]] = ()) -> LoadedConfig:
    """Load, merge and check.

    Args:
        files: YAML files, later ones win.
        overrides: command line options as (name, text), names with or without leading dashes, ours
            (``run.steps``) or Megatron-LM's (``num-layers``); a switch has the text ``true``.

    Raises:
        ConfigError: one line per error.
    """
    # Level 0 is the preset, which is only known once everything else is read.
    given = [from_file(path, level) for level, path in enumerate(files, start=1)]
    given.append(from_command_line(overrides, len(files) + 1))
    lines = [line for each in given for line in each.errors]
    preset, preset_lines = _preset([setting for each in given for setting in each.settings])
    lines += preset_lines
    levels = [preset, *([s for s in each.settings if s.key != PRESET_KEY] for each in given)]
    for settings in levels:
        lines += _conflicts(settings)
    winners = _merge(levels)
    origins = {key: setting.origin for key, setting in winners.items()}
    multiple = winners.pop(megatron.VOCAB_MULTIPLE, None)
    lines += [line for setting in winners.values() for line in _disguised_choice(setting)]
    try:
        config = Config.model_validate(_nested(winners.values()))
    except ValidationError as error:
        lines += _schema_errors(error, origins)
        raise_errors(lines)
        raise
    raise_errors(lines)
    config, broken = _resolved(config, origins)
    flags = {key: origin.flag for key, origin in origins.items()}
    if not broken:
        broken = [*validate(config), *megatron.usage_violations(config, flags, multiple.value if multiple else None)]
    raise_errors([_located(violation, origins) for violation in broken])
    return LoadedConfig(config, origins)


def _preset(settings: Sequence[Setting]) -> tuple[list[Setting], list[str]]:
    """Model settings of the last preset named, at level 0, and error lines."""
    chosen = [setting for setting in settings if setting.key == PRESET_KEY]
    if not chosen:
        return [], []
    try:
        path = preset_file(chosen[-1].value)
    except ConfigError as error:
        return [], [f"{chosen[-1].origin.place}: {error}"]
    given = from_file(path, 0)
    model = [setting for setting in given.settings if setting.key.startswith("model.") and setting.key != PRESET_KEY]
    return model, given.errors


def _conflicts(settings: Sequence[Setting]) -> list[str]:
    """Lines for settings that one source gives under two names with two values."""
    lines = []
    last: dict[str, dict[str, Setting]] = {}
    for setting in settings:
        last.setdefault(setting.key, {})[setting.origin.spelled] = setting
    for key, by_name in last.items():
        first, *others = by_name.values()
        for other in others:
            if not _equal(first.value, other.value):
                lines.append(
                    f"{other.origin.label(key)}: {show(other.value)} contradicts {show(first.value)} given as "
                    f"{first.origin.spelled}; both set {key}, keep one"
                )
    return lines


def _equal(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _merge(levels: Sequence[Sequence[Setting]]) -> dict[str, Setting]:
    """The setting that counts for each key. Interval and pattern say the same: the higher level's counts."""
    winners: dict[str, Setting] = {}
    for settings in levels:
        here = {setting.key: setting for setting in settings}
        if _INTERVAL in here:
            winners.pop(_PATTERN, None)
        if _PATTERN in here and here[_PATTERN].value != []:
            winners.pop(_INTERVAL, None)
        winners |= here
    return winners


def _nested(settings: Iterable[Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for setting in settings:
        *sections, name = setting.key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = setting.value
    return tree


def _schema_errors(error: ValidationError, origins: Mapping[str, Origin]) -> list[str]:
    lines = []
    for detail in error.errors():
        location = detail["loc"]
        key = next(name for name in _prefixes(location) if name in keys())
        depth = key.count(".") + 1
        # Inside a list the place alone does not say which entry: name it as the spelling goes on.
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{show_name(part)}" for part in location[depth:])
        if detail["type"] == "extra_forbidden":
            text = unknown_key(str(location[-1]), detail["input"], SourceConfig.model_fields)
        else:
            text = renamed_choice(key, detail["input"]) or schema_error(detail, hint_at(location))
        origin = origins[key]
        origin = dataclasses.replace(origin, spelled=origin.spelled + inner)
        lines.append(f"{origin.label(key + inner)}: {text}")
    return lines


def _disguised_choice(setting: Setting) -> list[str]:
    """A line if the value equals one of the choices without being it: pydantic takes true and 1.0 for 1."""
    key = keys()[setting.key]
    choices = get_args(key.annotation) if get_origin(key.annotation) is Literal else ()
    equal = [choice for choice in choices if choice == setting.value]
    if not equal or type(equal[0]) is type(setting.value):
        return []
    return [f"{setting.origin.label(key.name)}: not one of the choices (got {show(setting.value)}); {key.hint}"]


def _prefixes(location: tuple[int | str, ...]) -> Iterable[str]:
    names = [str(part) for part in location]
    return (".".join(names[:count]) for count in range(len(names), 0, -1))


def _resolved(config: Config, origins: Mapping[str, Origin]) -> tuple[Config, list[RuleViolation]]:
    """The configuration with an explicit layer pattern, or what is wrong with the pattern."""
    model = config.model
    violations = list(layer_violations(model))
    if violations:
        return config, violations
    if model.layer_types and _INTERVAL in origins:
        expanded = expand_interval(model.full_attention_interval, model.num_hidden_layers)
        if expanded != model.layer_types:
            differing = next(i for i, kind in enumerate(expanded) if kind != model.layer_types[i])
            text = (
                f"{_INTERVAL} {model.full_attention_interval} makes layer {differing} {expanded[differing]} but "
                f"{_PATTERN} says {model.layer_types[differing]}; keep one of the two settings"
            )
            return config, [RuleViolation((_PATTERN, _INTERVAL), text)]
    return config.model_copy(update={"model": with_layer_types(model)}), []


def _located(violation: RuleViolation, origins: Mapping[str, Origin]) -> str:
    """The line of a broken rule, at the place of the involved setting that was given last."""
    given = [key for key in violation.keys if key in origins]
    if not given:
        return f"{violation.keys[0]}: {violation.message}"
    key = max(given, key=lambda name: origins[name].level)
    label = origins[key].label(key) if key in keys() else origins[key].place
    return f"{label}: {violation.message}"
