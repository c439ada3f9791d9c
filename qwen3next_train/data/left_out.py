"""Documents of a source that are not taken: how many for which reason, and which was the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen3next_train.config.error_lines import show_name


@dataclass(frozen=True)
class LeftOut:
    """What is left out for one reason.

    Args:
        count: how many documents, or files that hold none.
        example: the first of them: the file's name in its source, with line or row where it has several documents.
    """

    count: int
    example: str


LeftOuts = dict[str, LeftOut]
"""By reason."""


def leave_out(left_out: LeftOuts, reason: str, example: str) -> None:
    """Count one more."""
    found = left_out.get(reason, LeftOut(0, example))
    left_out[reason] = LeftOut(found.count + 1, found.example)


def format_left_out(left_out: Mapping[str, LeftOut]) -> str:
    """What was left out, in one line."""
    return ", ".join(
        f"{found.count} {reason} (such as {show_name(found.example)})" for reason, found in sorted(left_out.items())
    )
