"""Which backend runs each operation and why, as the start of a run and ``doctor`` show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelChoice:
    """One line of the start-up table.

    Args:
        operation: field of :class:`KernelSet`.
        backend: the backend that runs.
        reason: why it was chosen.
        key: field of :class:`KernelsConfig` that chooses it.
    """

    operation: str
    backend: str
    reason: str
    key: str


def format_choices(choices: tuple[KernelChoice, ...]) -> str:
    """The start-up table, one operation a line."""
    return "\n".join(f"{c.operation:<22}{c.backend:<12}{c.reason}" for c in choices)


def summarize_choices(choices: tuple[KernelChoice, ...]) -> str:
    """The same in one line, by the keys of ``kernels``; a reason where another backend could be wished for.

    Operations of a key that another backend runs than the first of them stand behind it.
    """
    if len({(choice.backend, choice.reason) for choice in choices}) == 1:
        return f"{choices[0].backend} ({choices[0].reason})"
    keys = dict.fromkeys(choice.key for choice in choices)
    return ", ".join(_summarize_key([choice for choice in choices if choice.key == key]) for key in keys)


def _summarize_key(choices: list[KernelChoice]) -> str:
    first = choices[0]
    notes = [first.reason] if first.backend == "reference" else []
    notes += [f"{choice.operation} {choice.backend}" for choice in choices if choice.backend != first.backend]
    return f"{first.key} {first.backend}" + (f" ({', '.join(notes)})" if notes else "")
