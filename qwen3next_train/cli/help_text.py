"""``--help``: one screen first, the rest by topic: a subcommand, a section of the configuration, Megatron's names."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable

from qwen3next_train.cli.command import Command
from qwen3next_train.cli.commands import COMMANDS
from qwen3next_train.config import megatron
from qwen3next_train.config.describe import keys, sections
from qwen3next_train.config.error_lines import show
from qwen3next_train.config.presets import PRESETS
from qwen3next_train.config.settings import PRESET_KEY
from qwen3next_train.errors import ConfigError

_NARROWEST = 50  # the longest names stay whole
_PROGRAM = "qwen3next-train"
_SET_MOST = (
    *("run.dir", "run.steps", "run.global_batch_size", "run.micro_batch_size"),
    *("data.sources", "data.tokenizer", "data.sequence_length"),
    *("optimizer.lr", "parallel.expert_parallel_size", "parallel.recompute"),
)
_OTHER_TOPICS = {
    "megatron": "Megatron-LM's arguments, understood too, and what each sets",
    "all": "everything",
}
_PRESET_ROW = (f"--{PRESET_KEY}", f"start from a shipped model shape [{'|'.join(PRESETS)}; default none]")


def help_text(argv: list[str]) -> str:
    """The help that a command line asks for.

    Args:
        argv: the command line; an argument right after ``--help`` is a topic, unless a subcommand came before it.

    Raises:
        ConfigError: when there is no such topic.
    """
    width = max(shutil.get_terminal_size().columns, _NARROWEST)
    position = next(index for index, arg in enumerate(argv) if arg in ("--help", "-h"))
    if before := [arg for arg in argv[:position] if arg in COMMANDS]:
        return _text(_command(COMMANDS[before[0]], width))
    topic, *rest = [*argv[position + 1 :], ""]
    if topic and not topic.startswith("-"):
        return _text(_topic(topic, width))
    if after := [arg for arg in rest if arg in COMMANDS]:
        return _text(_command(COMMANDS[after[0]], width))
    return _text(_overview(width))


def _topic(topic: str, width: int) -> list[str]:
    descriptions = dict(sections())
    if topic == "all":
        parts = [_command(command, width) for command in COMMANDS.values()]
        return _joined([*parts, *(_section(section, width) for section in descriptions), _megatron(width)])
    if topic == "megatron":
        return _megatron(width)
    # Two argv, eval and checkpoint, name a subcommand and a section: both are shown.
    found = [_command(COMMANDS[topic], width)] if topic in COMMANDS else []
    found += [_section(topic, width)] if topic in descriptions else []
    if "." in topic and (named := [name for name in keys() if f"{name}.".startswith(f"{topic.rstrip('.')}.")]):
        found.append(_rows((_described(name) for name in named), width))
    if topic == PRESET_KEY:
        found.append(_rows([_PRESET_ROW], width))
    if not found:
        raise ConfigError(
            f"--help: no such section (got {show(topic)}); give one of {', '.join([*descriptions, *_OTHER_TOPICS])}, "
            "or a subcommand"
        )
    return _joined(found)


def _overview(width: int) -> list[str]:
    # To the first colon or semicolon: the rest is for who has chosen the key.
    descriptions = {key.name: re.split("[:;] ", key.description)[0] for key in keys().values()}
    return [
        *_wrapped(f"usage: {_PROGRAM} [SUBCOMMAND] --config FILE [--section.key VALUE ...]", width),
        "",
        *_wrapped("Subcommands (SUBCOMMAND --help lists the options of one):", width),
        *_rows(((each.name, each.summary) for each in COMMANDS.values()), width),
        "",
        *_wrapped("Sections of the configuration (--help SECTION lists its keys), and other topics:", width),
        *_wrapped(f"  {', '.join(name for name, _ in sections())}", width),
        *_rows(_OTHER_TOPICS.items(), width),
        "",
        *_wrapped("Keys that are set most, here or in YAML:", width),
        *_rows(((f"--{name}", descriptions[name]) for name in _SET_MOST), width),
    ]


def _command(command: Command, width: int) -> list[str]:
    lines = _wrapped(f"usage: {_PROGRAM} {command.name} {command.usage}", width)
    lines += ["", *_wrapped(f"{command.summary[0].upper()}{command.summary[1:]}.", width)]
    lines += _wrapped(command.details, width)
    options = [(f"{option.name} {option.metavar}".strip(), option.help) for option in command.all_options]
    lines += ["", "Options:", *_rows(options, width), ""]
    if command.keys is None:
        lines += _wrapped(f"Every configuration key works here too: {_PROGRAM} --help SECTION, or --help all.", width)
        return lines + _wrapped("Precedence: model.preset < files in order < command line.", width)
    if not command.keys:
        return [*lines, "No configuration key works here."]
    lines += _wrapped("Of the configuration keys and their Megatron-LM names, these work here too:", width)
    rows = [(f"--{name}", f"{keys()[name].description} [{keys()[name].type_text}]") for name in command.keys]
    return lines + _rows(rows, width)


def _section(section: str, width: int) -> list[str]:
    rows = []
    if PRESET_KEY.startswith(f"{section}."):
        rows.append(_PRESET_ROW)
    rows += [_described(name) for name in keys() if name.startswith(f"{section}.")]
    return [*_wrapped(f"{section}: {dict(sections())[section]}", width), *_rows(rows, width)]


def _described(name: str) -> tuple[str, str]:
    key = keys()[name]
    return f"--{name}", f"{key.description} [{key.type_text}; default {key.default}]"


def _megatron(width: int) -> list[str]:
    lines = _wrapped("Megatron-LM's arguments, on the command line or in YAML, and the key each one sets:", width)
    return lines + _rows(((entry.flag, entry.effect) for entry in megatron.arguments()), width)


def _rows(pairs: Iterable[tuple[str, str]], width: int) -> list[str]:
    """Two columns; where the first would take more than half, what it names follows on lines of its own."""
    pairs = list(pairs)
    column = max(len(left) for left, _ in pairs) + 4
    lines = []
    for left, right in pairs:
        if column <= width // 2:
            lines += _wrapped(f"  {left:<{column - 2}}{right}", width, column)
        else:
            lines += [f"  {left}", *_wrapped(f"      {right}", width, 6)]
    return lines


def _wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


def _joined(parts: list[list[str]]) -> list[str]:
    return [line for part in parts for line in (*part, "")][:-1]


def _text(lines: list[str]) -> str:
    return "\n".join([*lines, ""])
