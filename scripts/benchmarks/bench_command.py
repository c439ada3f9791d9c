"""How the benchmarks are called: whole numbers of their options, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from qwen3next_train.errors import ConfigError, TrainError


def count(option: str, text: str) -> int:
    """A whole number > 0.

    Raises:
        ConfigError: ``text`` is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option}: give a whole number > 0 (got {text})")
    return int(text)


def run_main(main: Callable[[list[str]], int]) -> NoReturn:
    """Leave with what ``main`` returns for the command line, or with 2 and one line for what it raises."""
    try:
        sys.exit(main(sys.argv[1:]))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
