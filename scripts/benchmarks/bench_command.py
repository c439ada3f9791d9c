"""How the benchmarks are called: whole numbers and folders of their options, help, errors in one line."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from qwen3next_train.cli.arguments import Option
from qwen3next_train.errors import ConfigError, TrainError


def count(option: str, text: str) -> int:
    """A whole number > 0.

    Raises:
        ConfigError: ``text`` is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option}: give a whole number > 0 (got {text})")
    return int(text)


def scratch_folder(parent: str | None, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A new folder that is removed at the end of a ``with``.

    Args:
        parent: where, made if it is missing; None for the place of temporary files.
        prefix: of its name.

    Raises:
        ConfigError: it cannot be made there.
    """
    try:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=prefix)
    except OSError as error:
        raise ConfigError(f"--dir: no folder can be made in {parent}: {error.strerror}") from error


def run_main(main: Callable[[list[str]], int], text: str | None, options: Mapping[str, Option]) -> NoReturn:
    """Leave with what ``main`` returns for the command line, or with 2 and one line for what it raises.

    Args:
        main: takes the command line.
        text: of ``--help``, beside the options; the script's docstring.
        options: those of the script; configuration keys come beside them.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{text}\nOptions, and any configuration key as --KEY VALUE:")
        for option in options.values():
            print(f"  {f'{option.name} {option.metavar}'.rstrip():<24}  {option.help}")
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
