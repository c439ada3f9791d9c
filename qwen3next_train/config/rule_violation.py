"""What a rule that spans settings says when it is broken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuleViolation:
    """One broken rule.

    Args:
        keys: the settings involved, the one to name first at the front.
        message: a whole sentence with values and hint.
    """

    keys: tuple[str, ...]
    message: str
