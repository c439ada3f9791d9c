"""Texts of configuration errors: one line each, with the value and a hint."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence

from pydantic_core import ErrorDetails

from qwen3next_train.config.bounds import UNUSABLE
from qwen3next_train.config.foreign_names import answer, family_answer, own_key, unit_of_own_key
from qwen3next_train.config.strict_yaml import Value
from qwen3next_train.errors import ConfigError

Converted = dict[str, Value]
"""Settings that a foreign spelling gives, by dotted key."""

MAX_LINES = 30
_MAX_SHOWN = 60
_MAX_PROBLEM = 200
_LEAST_LIKENESS = 0.5
"""Of names, 0 to 1: one of two letters is right. What is less alike is no misspelling."""
_TYPING_ERROR = 0.9
"""Likeness from which on a name is a misspelling rather than another trainer's."""
_TOO_LONG = 1e18
_LONG_NUMBER = re.compile("[1-9][0-9]{18,}")

_WRONG_TYPE = {
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "bool_type": "neither true nor false",
    "string_type": "not text",
    "list_type": "not a list",
    "model_type": "not a mapping",
    "dict_type": "not a mapping",
    "literal_error": "not one of the choices",
    "finite_number": "not finite",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "missing": "missing",
}


class RejectedValue(ValueError):
    """A value of a foreign spelling that cannot be honoured; the text is the line after the key."""


def show(value: object) -> str:
    """A value as YAML would write it, on one line, cut to a readable length, invisible characters escaped."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, float) and not math.isfinite(value):
        text = f".{value}" if value > 0 or math.isnan(value) else f"-.{-value}"
    else:
        text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def show_name(name: str) -> str:
    """A key or file name; quoted and escaped when it has characters that could deceive or break the line."""
    if 0 < len(name) <= 2 * _MAX_SHOWN and name.isprintable() and (name.isascii() or "/" in name):
        return name
    return ascii(name) if len(name) <= 2 * _MAX_SHOWN else ascii(name[: 2 * _MAX_SHOWN]) + "..."


def show_stored(value: object) -> str:
    """A value of a stored configuration, which may be anything; text as it stands, as far as it fits a line."""
    return show_name(value) if isinstance(value, str) else show(value)


def _most_alike(name: str, candidates: Iterable[str]) -> tuple[float, str]:
    """The candidate that is nearest, as a whole or by its last part, and how alike it is, 0 to 1."""
    matcher = difflib.SequenceMatcher(autojunk=False)

    def ratio(left: str, right: str) -> float:
        matcher.set_seqs(left, right)
        return matcher.ratio()

    name = name[: 2 * _MAX_SHOWN].lower().replace("-", "_").strip("_")
    leaf = name.rpartition(".")[2]
    # A key put under the wrong section is as likely as a typing error: its last part alone then fits. A word
    # without a section is first of all a section.
    leaf_weight = 0.97 if "." in name else 0.85

    def score(candidate: str) -> float:
        plain = candidate.lower().replace("-", "_").strip("_")
        return max(ratio(name, plain), leaf_weight * ratio(leaf, plain.rpartition(".")[2]))

    return max(((score(candidate), candidate) for candidate in candidates), key=lambda scored: scored[0])


def unknown_key(name: str, value: object, candidates: Iterable[str]) -> str:
    """The part of the line after the key for a key that does not exist."""
    return f"unknown key (got {show(value)}); {meant(name, candidates)} --help all lists every key"


def meant(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """What a user most likely meant by a name that does not exist, other trainers' usual names included.

    Args:
        name: as it was written.
        candidates: what may stand there.
        prefix: what our keys begin with there, ``--`` on the command line.
    """
    candidates = list(candidates)
    if (key := own_key(name, [each.removeprefix(prefix) for each in candidates])) is not None:
        unit = unit_of_own_key(name)
        return f"did you mean {prefix}{key}, {unit}?" if unit else f"did you mean {prefix}{key}?"
    if (instead := answer(name)) is not None:
        return f"{instead};"
    likeness, candidate = _most_alike(name, candidates)
    if likeness < _TYPING_ERROR and (instead := family_answer(name)) is not None:
        return f"{instead};"
    return f"did you mean {candidate}?" if likeness >= _LEAST_LIKENESS else "no key is called anything like it;"


def schema_error(error: ErrorDetails, hint: str) -> str:
    """The part of the line after the key for one of pydantic's errors."""
    value = error["input"]
    problem = _WRONG_TYPE.get(error["type"], error["msg"])
    if error["type"] in ("int_type", "float_type") and isinstance(value, str) and _LONG_NUMBER.fullmatch(value):
        # The reader leaves it text.
        problem = "too large"
    if error["type"] == "int_type" and (digits := in_digits(value)):
        problem, hint = "not written as a whole number", f"write {digits}"
    if error["type"] in UNUSABLE:
        hint = "give another name"
    return f"{problem} (got {show(value)}); {hint}"


def in_digits(value: object) -> str:
    """A whole number that was written as a fraction (1e6, 4.0), as it is to be written; empty for all else."""
    if isinstance(value, float) and value.is_integer() and 0 <= value < _TOO_LONG:
        return str(int(value))
    return ""


def check_in_digits(label: str, value: object, text: str) -> None:
    """Refuse an option's whole number that was written as a fraction.

    Args:
        label: of the option.
        value: what its text was read as.
        text: as it was given.

    Raises:
        ConfigError: it was; the line says how to write it.
    """
    if digits := in_digits(value):
        raise ConfigError(f"{label}: not written as a whole number (got {show(text)}); write {digits}")


def json_problem(error: Exception) -> str:
    """Why ``json`` could not read something, in one line: its ``ValueError`` or ``RecursionError``."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    if "integer string conversion" in text:  # Python's limit, with advice about Python
        return f"an integer of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= _MAX_PROBLEM else text[: _MAX_PROBLEM - 3] + "..."


def raise_errors(lines: Sequence[str]) -> None:
    """Raise all lines as one error, if there are any."""
    if not lines:
        return
    unique = list(dict.fromkeys(lines))
    if len(unique) > MAX_LINES:
        unique = [*unique[:MAX_LINES], f"... and {len(unique) - MAX_LINES} more errors; fix these first"]
    raise ConfigError("\n".join(unique))
