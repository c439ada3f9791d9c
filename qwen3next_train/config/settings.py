"""Settings as they were given: files and command line, under any accepted spelling, as dotted keys with origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.config import huggingface, megatron
from qwen3next_train.config.describe import keys, subsections
from qwen3next_train.config.error_lines import RejectedValue, show, show_name, unknown_key
from qwen3next_train.config.megatron import MegatronArgument
from qwen3next_train.config.renamed import renamed_key
from qwen3next_train.config.schema import Config
from qwen3next_train.config.strict_yaml import Value, parse_scalar, read_yaml
from qwen3next_train.errors import ConfigError

PRESET_KEY = "model.preset"
"""Consumed by the loader; no field of the schema."""

_SOURCE_KEYS = ("data.sources", "data.validation_sources")
_SOURCE_SETS = "data.validation_sets"
# Megatron-LM's Qwen3-Next arguments that are no model settings here may still stand in the model section.
_MODEL_GUESTS = ("--no-weight-decay-cond-type", "--apply-wd-to-qk-layernorm")


@dataclass(frozen=True)
class Origin:
    """Where a setting was given.

    Args:
        level: precedence, higher wins.
        file: name of the file, empty for the command line.
        spelled: the key as written there, section included.
        flag: Megatron-LM's flag when it was given under that name, else empty.
    """

    level: int
    file: str
    spelled: str
    flag: str = ""

    @property
    def place(self) -> str:
        """File and key as spelled there."""
        return f"{self.file}: {self.spelled}" if self.file else self.spelled

    def label(self, key: str) -> str:
        """Begin of an error line about ``key``: the place, and the key where it is spelled otherwise."""
        return self.place if self.spelled.removeprefix("--") == key else f"{self.place} ({key})"


@dataclass(frozen=True)
class Setting:
    """One value for one dotted key."""

    key: str
    value: Value
    origin: Origin


@dataclass(frozen=True)
class Given:
    """What one source gave: settings in order, and one line per error."""

    settings: list[Setting]
    errors: list[str]


def from_file(path: Path, level: int) -> Given:
    """Read one configuration file; errors of single keys are collected.

    Raises:
        ConfigError: when the file is unreadable or not strict YAML.
    """
    document = read_yaml(path)
    assert isinstance(document, dict)
    reader = _Reader(level, show_name(str(path)))
    for name, value in document.items():
        argument = megatron.find(name)
        if name in Config.model_fields:
            reader.section(name, value)
        elif argument:
            reader.convert(show_name(name), argument, value)
        else:
            reader.unknown(name, value)
    return reader.given


def from_command_line(overrides: Sequence[tuple[str, str]], level: int) -> Given:
    """Read overrides as (name, text): ``("run.steps", "100")``, ``("num-layers", "4")``; a switch has "true"."""
    reader = _Reader(level, "")
    for name, text in overrides:
        try:
            reader.override(name, text)
        except ConfigError as error:
            reader.given.errors.append(str(error))
    return reader.given


class _Reader:
    """Collects the settings and errors of one source."""

    def __init__(self, level: int, file: str) -> None:
        self.given = Given([], [])
        self._level = level
        self._file = file

    def section(self, section: str, value: Value) -> None:
        """A section of a file, its subsections included."""
        if not isinstance(value, dict):
            text = f"not a mapping (got {show(value)}); put its keys below it, or remove the line"
            self.given.errors.append(f"{self._file}: {section}: {text}")
            return
        for name, item in value.items():
            key = f"{section}.{name}"
            if key in subsections():
                self.section(key, item)
            else:
                self.key(key, item)

    def key(self, key: str, value: Value) -> None:
        """One key below a section, ours or foreign."""
        section, _, name = key.partition(".")
        argument = megatron.find(name)
        if key in keys() or key == PRESET_KEY:
            self._add(key, value, Origin(self._level, self._file, self._spelled(key)))
        elif argument and _may_stand_in(section, name, argument):
            self.convert(self._spelled(key), argument, value)
        elif section == "model" and huggingface.tolerates(name):
            self._huggingface(key, name, value)
        else:
            self.unknown(key, value)

    def convert(self, spelled: str, argument: MegatronArgument, value: Value) -> None:
        """A setting under a Megatron-LM name."""
        origin = Origin(self._level, self._file, spelled, argument.flag)
        try:
            converted = argument.convert(value)
        except RejectedValue as error:
            self.given.errors.append(f"{origin.place}: {error}")
            return
        for key, item in converted.items():
            self._add(key, item, origin)

    def override(self, name: str, text: str) -> None:
        """One option of the command line."""
        key = name.removeprefix("--")
        option = f"--{show_name(key)}"
        argument = megatron.find(key)
        if key in keys():
            self.key(key, _parse_for(key, text, option))
        elif "." in key and key in subsections():
            raise ConfigError(f"{option}: a section (got {show(text)}); give its keys one by one, {option}.KEY VALUE")
        elif "." in key:
            self.key(key, parse_scalar(text, option))
        elif argument:
            self.convert(option, argument, text if argument.is_text else parse_scalar(text, option))
        else:
            self.unknown(key, text)

    def unknown(self, name: str, value: Value) -> None:
        """A key that does not exist."""
        candidates = [*keys(), PRESET_KEY]
        if self._file and "." not in name:
            candidates += [*subsections()]
        section, _, leaf = name.partition(".")
        if renamed := renamed_key(name, value):
            text = renamed
        elif self._file and name in keys():
            text = f"a dotted key (got {show(value)}); write '{leaf}:' below '{section}:'"
        else:
            # A hyphen means Megatron-LM's spelling was meant.
            flags = [argument.flag for argument in megatron.arguments()]
            text = unknown_key(name, value, flags if "-" in name.strip("-") and "." not in name else candidates + flags)
        shown = show_name(name)
        self.given.errors.append(f"{self._file}: {shown}: {text}" if self._file else f"--{shown}: {text}")

    def _huggingface(self, key: str, name: str, value: Value) -> None:
        origin = Origin(self._level, self._file, self._spelled(key))
        try:
            converted = huggingface.convert(name, value)
        except RejectedValue as error:
            self.given.errors.append(f"{origin.place}: {error}")
            return
        for target, item in converted.items():
            self._add(target, item, origin)

    def _spelled(self, key: str) -> str:
        return show_name(key) if self._file else f"--{show_name(key)}"

    def _add(self, key: str, value: Value, origin: Origin) -> None:
        if key in _SOURCE_KEYS:
            value = _as_sources(value)
        elif key == _SOURCE_SETS and isinstance(value, dict):
            value = {name: _as_sources(sources) for name, sources in value.items()}
        self.given.settings.append(Setting(key, value, origin))


def _may_stand_in(section: str, name: str, argument: MegatronArgument) -> bool:
    """Whether a Megatron-LM spelling may stand in a section: its own, or model if it is unmistakable there."""
    if section == argument.section:
        return True
    return section == "model" and (argument.flag in _MODEL_GUESTS or name.startswith("--"))


def _parse_for(key: str, text: str, option: str) -> Value:
    if keys()[key].annotation is str:
        return text
    if key in _SOURCE_KEYS and text[:1] not in ("[", "{"):
        return text  # a name, whatever characters it has
    return parse_scalar(text, option)


def _as_sources(value: Value) -> Value:
    """One name or a list of names as the list of mappings that the schema wants."""
    if isinstance(value, str):
        return [{"source": value}]
    if isinstance(value, list):
        return [{"source": item} if isinstance(item, str) else item for item in value]
    return value
