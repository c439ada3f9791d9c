"""Types of the schema's values: what fp32, the data, the file system and the machine can hold."""

from __future__ import annotations

import os
import re
import sys
from pathlib import PurePath
from typing import Annotated, Final

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from qwen3next_train.errors import ConfigError

# fp32 holds 1.2e-38 to 3.4e38; the rest is for what these are multiplied with.
_LARGEST = 1e30
_SMALLEST = 1e-30
_UNUSABLE_TEXT: Final = "unusable_text"
_UNUSABLE_PATH: Final = "unusable_path"
UNUSABLE = (_UNUSABLE_TEXT, _UNUSABLE_PATH)
"""Types of the errors that texts and paths raise; the texts are the error line's."""
_MAX_PATH_BYTES = 4095
_MAX_NAME_BYTES = 255
_MAX_SHOWN = 60
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class UnusableText(ValueError):
    """A text or path that files or the system cannot take; the text says why."""


def usable_text(text: str) -> str:
    """The text, when every file, log and command line can hold it.

    Raises:
        UnusableText: it cannot be written as UTF-8, or has a NUL byte.
    """
    if "\0" in text:
        raise UnusableText("has a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A word of the command line, whose bytes may well be UTF-8.
        raise UnusableText(_of_locale() or "has bytes that are no UTF-8") from error
    return text


def _of_locale() -> str:
    """What is wrong where Python does not take words and names for UTF-8; empty where it does."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return ""
    return f"has characters that names cannot have in this locale ({encoding}; unset PYTHONUTF8 or set LC_ALL=C.UTF-8)"


def usable_path(text: str) -> str:
    """The path with ``~`` and ``~user`` replaced by the home folder, when the system can take it.

    Raises:
        UnusableText: it cannot be a path, or there is no such home folder.
    """
    path = usable_text(text)
    if _CONTROL.search(path):
        # Messages are lines, and so are lists of names.
        raise UnusableText("has a line break or another control character")
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if not path.startswith("/") or os.environ.get("HOME") == "":
            raise UnusableText("names a home folder that is not known (set HOME, or write ./~ for a file of that name)")
        usable_text(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UnusableText(_of_locale()) from error
    if len(path.encode()) > _MAX_PATH_BYTES:
        raise UnusableText(f"is longer than {_MAX_PATH_BYTES} bytes")
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in PurePath(path).parts):
        raise UnusableText(f"has a name of more than {_MAX_NAME_BYTES} bytes")
    return path


def path_argument(text: str, option: str) -> str:
    """:func:`usable_path` of a command line word, which an unset variable of a shell may have left empty.

    Raises:
        ConfigError: names the option.
    """
    if not text:
        raise ConfigError(f"{option}: empty (got ''); give a file or folder")
    try:
        return usable_path(text)
    except UnusableText as error:
        raise ConfigError(f"{option}: {error} (got {ascii(text)[:_MAX_SHOWN]}); give another name") from error


def text_argument(text: str, option: str) -> str:
    """:func:`usable_text` of a command line word.

    Raises:
        ConfigError: names the option.
    """
    try:
        return usable_text(text)
    except UnusableText as error:
        raise ConfigError(f"{option}: {error} (got {ascii(text)[:_MAX_SHOWN]}); give another text") from error


def _checked_text(text: str) -> str:
    try:
        return usable_text(text)
    except UnusableText as error:
        raise PydanticCustomError(_UNUSABLE_TEXT, "{reason}", {"reason": str(error)}) from error


def _checked_path(text: str) -> str:
    try:
        return usable_path(text)
    except UnusableText as error:
        raise PydanticCustomError(_UNUSABLE_PATH, "{reason}", {"reason": str(error)}) from error


def _limits(least: float, most: float) -> AfterValidator:
    """What no value but 0 may be below or above. Unlike bounds of the field these are not part of its type in help."""

    def check(value: float) -> float:
        if 0 < value < least:
            raise PydanticCustomError("below_limit", "too small, at least {limit}", {"limit": f"{least:.9g}"})
        if value > most:
            limit = str(most) if isinstance(most, int) else f"{most:.9g}"
            raise PydanticCustomError("above_limit", "too large, at most {limit}", {"limit": limit})
        return value

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_checked_text)]
PathText = Annotated[str, AfterValidator(_checked_path)]

_FP32 = _limits(_SMALLEST, _LARGEST)
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _FP32]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _FP32]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
# The largest that is less than 1 in fp32 is 0.99999994.
DecayRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _limits(_SMALLEST, 0.9999999)]
# A step multiplies the weights by 1 - lr * decay.
WeightDecay = Annotated[float, Field(ge=0, allow_inf_nan=False), _limits(_SMALLEST, 1e6)]
RotaryBase = Annotated[float, Field(gt=0, allow_inf_nan=False), _limits(1, _LARGEST)]
RotaryFraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
# torch's timeouts are whole milliseconds; a year is longer than any wait.
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), _limits(0.1, 31_536_000)]

# Folders of checkpoints have eight digits.
_STEPS = _limits(1, 99_999_999)
Steps = Annotated[int, Field(gt=0), _STEPS]
StepsOrNone = Annotated[int, Field(ge=0), _STEPS]
Rows = Annotated[int, Field(gt=0), _limits(1, 10**7)]
Samples = Annotated[int, Field(gt=0), _limits(1, 10**12)]
Seed = Annotated[int, Field(ge=0)]
# Positions are exact in fp32 up to here.
Positions = Annotated[int, Field(gt=0), _limits(1, 2**24)]
# Token ids of the .bin/.idx format have 32 bits.
VocabSize = Annotated[int, Field(gt=0), _limits(1, 2**31 - 1)]
# Products of these, the number of experts included, stay within the 64 bits of a tensor's size.
_WIDTH = _limits(1, 2**20)
Width = Annotated[int, Field(gt=0), _WIDTH]
WidthOrNone = Annotated[int, Field(ge=0), _WIDTH]
# A logit of 1e38 divided by the least of them is a number, and more than a flat distribution there is not.
TEMPERATURES = (0.001, 1000.0)
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), _limits(*TEMPERATURES)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _FP32]
MAX_TOP_K = 2**31 - 1
TopK = Annotated[int, Field(ge=0), _limits(1, MAX_TOP_K)]
NewTokens = Annotated[int, Field(gt=0), _limits(1, 4096)]
Heads = Annotated[int, Field(gt=0), _limits(1, 2**16)]
KernelWidth = Annotated[int, Field(ge=2), _limits(2, 2**10)]
MtpDepths = Annotated[int, Field(ge=0), _limits(1, 100)]
Layers = Annotated[int, Field(gt=0), _STEPS]
Ranks = Annotated[int, Field(gt=0), _limits(1, 10**6)]
PrefetchSteps = Annotated[int, Field(ge=0), _limits(1, 1000)]
