"""Keys and choices of earlier versions: rejected where a user writes them, translated where a run has stored them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3next_train.config.error_lines import show


@dataclass(frozen=True)
class Successor:
    """What a key has become.

    Args:
        new: the key now, which takes the same values; None when the key was removed.
        why: the reason; for a removed key also what to write instead.
    """

    new: str | None
    why: str


KEYS: Mapping[str, Successor] = {
    "kernels.causal_conv1d": Successor(
        None, "the convolution is part of the GDN prologue; choose with kernels.fused, or leave the key out"
    ),
}
"""By old key, ``section.key``."""

CHOICES: Mapping[str, Mapping[str, str]] = {"parallel.recompute": {"conv_gates": "gdn_prologue"}}
"""By key as it is now, ``section.key``: old choice to new choice."""


def renamed_key(key: str, value: object) -> str | None:
    """The part of the error line after the key for a key of an earlier version; None for any other."""
    successor = KEYS.get(key)
    if successor is None:
        return None
    if successor.new is None:
        return f"removed (got {show(value)}); {successor.why}"
    return f"renamed (got {show(value)}); write {successor.new} ({successor.why})"


def renamed_choice(key: str, value: object) -> str | None:
    """The part of the error line after the key for a choice of an earlier version; None for any other.

    Args:
        key: as it is now, also when the value is an entry of its list.
        value: the choice.
    """
    new = CHOICES.get(key, {}).get(value) if isinstance(value, str) else None
    return None if new is None else f"renamed (got {show(value)}); write {new}"


def with_current_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration that an earlier version has stored, under the names of this version.

    Args:
        stored: sections as read from ``config.yaml`` or a manifest; not changed, and not assumed to be valid.
    """
    config = {name: dict(section) if isinstance(section, dict) else section for name, section in stored.items()}
    for key, successor in KEYS.items():
        section, name = _find(config, key)
        if name not in section:
            continue
        value = section.pop(name)
        if successor.new is not None:
            new_section, new_name = _find(config, successor.new)
            new_section.setdefault(new_name, value)
    for key, choices in CHOICES.items():
        section, name = _find(config, key)
        if name in section:
            section[name] = _with_current_choices(section[name], choices)
    return config


def _find(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section that should hold a key, an empty one if there is none, and the key's name in it."""
    section_name, name = key.split(".")
    section = config.get(section_name)
    return (section if isinstance(section, dict) else {}), name


def _with_current_choices(value: Any, choices: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [choices.get(item, item) if isinstance(item, str) else item for item in value]
    return choices.get(value, value) if isinstance(value, str) else value
