"""One finding of ``doctor``: made by the checks, gathered over ranks, printed as a line or as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen3next_train.errors import TrainError


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Args:
        check: its name, the same on every rank.
        ok: whether training can rely on it.
        detail: one line: what was found and, when it is not right, what to do.
    """

    check: str
    ok: bool
    detail: str

    def line(self) -> str:
        """How the console shows it."""
        return f"{'ok' if self.ok else 'FAIL':<5}{self.check:<28}{self.detail}"


def try_check(name: str, measure: Callable[[], list[Check]]) -> list[Check]:
    """What ``measure`` finds; if it breaks off, one failed check of this name with the first line of the reason."""
    try:
        return measure()
    except TrainError as error:
        return [Check(name, False, " ".join(str(error).split()))]
    except Exception as error:  # noqa: BLE001 - whatever breaks on this machine is the finding, and the next check runs
        lines = str(error).strip().splitlines() or ["no message"]
        return [Check(name, False, f"{type(error).__name__}: {lines[0].strip()}")]


def merge_ranks(by_rank: Sequence[Sequence[Check]]) -> list[Check]:
    """One check a name: good when it is good on all ranks that have it, else the first bad rank's finding."""
    found: dict[str, list[tuple[int, Check]]] = {}
    for rank, checks in enumerate(by_rank):
        for check in checks:
            found.setdefault(check.check, []).append((rank, check))
    merged = []
    for same in found.values():
        bad = [(rank, check) for rank, check in same if not check.ok]
        rank, check = bad[0] if bad else same[0]
        prefix = f"rank {rank}: " if bad and len(by_rank) > 1 else ""
        merged.append(Check(check.check, check.ok, prefix + check.detail))
    return merged
