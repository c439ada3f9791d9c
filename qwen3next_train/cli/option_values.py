"""Values of the program's own options, checked: each fault is one line that names the option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from qwen3next_train.cli.arguments import Arguments
from qwen3next_train.cli.processes import world_size
from qwen3next_train.config.bounds import path_argument
from qwen3next_train.config.error_lines import check_in_digits, show, show_name
from qwen3next_train.config.strict_yaml import plain_value
from qwen3next_train.errors import ConfigError

ChoiceT = TypeVar("ChoiceT", bound=str)


def finished_model(command: str, args: Arguments) -> tuple[Path | None, Path | None]:
    """The folders named by ``--checkpoint`` and ``--hf``, of which there has to be one."""
    given = {name: name in args.options for name in ("--checkpoint", "--hf")}
    require_one_of(command, "model", given)
    checkpoint, hf = (folder_of(args, name) if is_given else None for name, is_given in given.items())
    return checkpoint, hf


def require_one_of(command: str, what: str, given: Mapping[str, bool]) -> None:
    """Reject a command line with none or several of the options that say the same thing."""
    if sum(given.values()) != 1:
        got = "both" if all(given.values()) else "neither"
        raise ConfigError(f"{command}: which {what}? (got {got} of {' and '.join(given)}); give one of the two")


def require_one_process(command: str, args: Arguments) -> None:
    """Reject a command that was started on several ranks."""
    count = world_size(args)
    if count > 1:
        raise ConfigError(f"{command}: started as {count} processes (WORLD_SIZE); it is one, start it without torchrun")


def text_of(args: Arguments, name: str, meaning: str) -> str:
    """The value of an option that must be there."""
    text = args.last(name)
    if not text:
        raise ConfigError(f"{name}: {'missing' if text is None else 'empty'}; give {meaning}")
    return text


def folder_of(args: Arguments, name: str) -> Path:
    """The folder given to an option that must be there."""
    return Path(path_argument(text_of(args, name, "a folder"), name))


def path_of(args: Arguments, name: str) -> str | None:
    """A file or name given to an option, or None when it is absent."""
    text = args.last(name)
    return None if text is None else path_argument(text, name)


def choice_of(args: Arguments, name: str, choices: Sequence[ChoiceT]) -> ChoiceT | None:
    """One of the choices, or None when the option is absent."""
    text = args.last(name)
    chosen = next((choice for choice in choices if choice == text), None)
    if chosen is None and text is not None:
        raise ConfigError(f"{name}: not one of the choices (got {show(text)}); give one of {', '.join(choices)}")
    return chosen


def number_of(
    args: Arguments,
    name: str,
    *,
    whole: bool = False,
    or_zero: bool = False,
    at_most: float = math.inf,
    limits: tuple[float, float] = (0, math.inf),
) -> float | None:
    """A positive number given to an option, or None when it is absent; beyond ``limits`` results make no sense."""
    text = args.last(name)
    if text is None:
        return None
    value = plain_value(text)
    wanted = f"{'whole ' if whole else ''}number {'>=' if or_zero else '>'} 0"
    wanted += f" and <= {at_most:g}" if at_most < math.inf else ""
    is_number = type(value) is int or (type(value) is float and not whole)
    if or_zero and is_number and value == 0:
        return 0.0
    if whole:
        check_in_digits(show_name(name), value, text)
    # The comparison also rejects a value that is not a number at all (.nan).
    if not is_number or not 0 < float(value or 0) <= at_most or math.isinf(float(value or 0)):
        raise ConfigError(f"{show_name(name)}: not a {wanted} (got {show(text)}); give a {wanted}")
    least, most = limits
    if not least <= float(value or 0) <= most:
        raise ConfigError(f"{show_name(name)}: {text} is not between {least:g} and {most:g}; give another number")
    return float(value or 0)
