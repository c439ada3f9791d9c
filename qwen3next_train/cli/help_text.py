"""``--help``: usage, subcommands, every configuration key, every Megatron-LM spelling."""

from __future__ import annotations

from collections.abc import Iterable

from qwen3next_train.cli.arguments import Option
from qwen3next_train.cli.commands import COMMANDS, TRAIN, Command
from qwen3next_train.config import megatron
from qwen3next_train.config.describe import keys, sections
from qwen3next_train.config.presets import PRESETS
from qwen3next_train.config.settings import PRESET_KEY

_WIDTH = 42


def help_text(command: Command) -> str:
    """The help of a subcommand; that of ``train`` is the program's and lists every key."""
    lines = [f"usage: qwen3next-train {'' if command is TRAIN else command.name + ' '}{command.usage}", ""]
    lines += [command.summary[0].upper() + command.summary[1:] + ".", ""]
    if command is TRAIN:
        lines += ["subcommands (qwen3next-train SUBCOMMAND --help):"]
        lines += _rows((each.name, each.summary) for each in COMMANDS.values())
        lines += [""]
    lines += ["options:", *_option_rows(command.all_options), ""]
    if command is not TRAIN:
        return "\n".join([*lines, *_keys_of_subcommand(command), ""])
    lines += ["Configuration keys, in YAML as 'section:' and 'key: value' below it."]
    lines += ["Precedence: model.preset < files in order < command line.", ""]
    for section, description in sections():
        lines += [f"{section}: {description}", *_key_rows(section), ""]
    lines += ["Megatron-LM's arguments, on the command line or in YAML, and the key each one sets:"]
    lines += _rows((entry.flag, entry.effect) for entry in megatron.arguments())
    return "\n".join([*lines, ""])


def _keys_of_subcommand(command: Command) -> list[str]:
    if command.keys is None:
        return ["Every configuration key works here too: qwen3next-train --help lists them."]
    if not command.keys:
        return ["No configuration key works here."]
    rows = _rows((f"--{name}", f"{keys()[name].description} [{keys()[name].type_text}]") for name in command.keys)
    return ["Of the configuration keys and their Megatron-LM names, these work here too:", *rows]


def _key_rows(section: str) -> list[str]:
    rows = []
    if PRESET_KEY.startswith(f"{section}."):
        rows.append((f"--{PRESET_KEY}", f"start from a shipped model shape [{'|'.join(PRESETS)}; default none]"))
    for key in keys().values():
        if key.name.startswith(f"{section}."):
            rows.append((f"--{key.name}", f"{key.description} [{key.type_text}; default {key.default}]"))
    return _rows(rows)


def _option_rows(options: Iterable[Option]) -> list[str]:
    return _rows((f"{option.name} {option.metavar}".strip(), option.help) for option in options)


def _rows(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {left:<{_WIDTH}} {right}" for left, right in pairs]
