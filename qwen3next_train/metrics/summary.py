"""What a run came to, said when an attempt ends: steps, tokens, losses, time, and where things are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qwen3next_train.log import get_logger
from qwen3next_train.metrics.sinks import Record
from qwen3next_train.metrics.step_line import format_duration, format_si, labelled


class _Loss(NamedTuple):
    """A loss and the step it was measured at."""

    value: float
    step: int

    def __str__(self) -> str:
        return f"{self.value:.4f} at step {self.step}"


class SummarySink:
    """Remembers the losses of a run and logs its summary at the end, unless no step was taken.

    Args:
        metrics_path: ``metrics.jsonl``.
        first_step: step the attempt goes on from, 0 for a new run.
        total_steps: last step of the run.
        newest_checkpoint: name of the run's newest checkpoint in ``checkpoints``, None without one.
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        first_step: int,
        total_steps: int,
        newest_checkpoint: Callable[[], str | None],
    ) -> None:
        self._metrics_path = metrics_path
        self._first_step = self._step = first_step
        self._total_steps = total_steps
        self._newest_checkpoint = newest_checkpoint
        self._last: dict[str, _Loss] = {}
        self._best: dict[str, _Loss] = {}
        self._bits_per_byte: dict[str, float] = {}
        self._tokens = self._skipped = 0
        self._first_tokens = 0
        self._started_at = time.monotonic()

    def take_earlier(self, row: Mapping[str, object]) -> None:
        """Take a row of an earlier attempt, as far as it holds numbers; to be called before :meth:`log`."""
        with suppress(ValueError, OverflowError):
            self._take({name: float(value) for name, value in row.items() if isinstance(value, int | float)})
        self._first_tokens = self._tokens

    def advance(self, step: int) -> None:
        """Note a finished step; to be called for every step, logged or not."""
        self._step = step

    def log(self, record: Record) -> None:
        """Take one logged step."""
        self._take(record)

    def close(self) -> None:
        """Log the summary."""
        if self._step > self._first_step:
            for line in self.lines(time.monotonic() - self._started_at):
                get_logger().info("%s", line)

    def lines(self, duration_s: float) -> list[str]:
        """The summary of an attempt that took ``duration_s`` seconds."""
        taken = self._step - self._first_step
        begun = "" if not self._first_step else f", {taken:,} of them in this attempt"
        skipped = f", {self._skipped:,} skipped" if self._skipped else ""
        steps = f"{self._step:,} of {self._total_steps:,}{begun}{skipped}"
        lines = [labelled("steps", f"{steps}, in {format_duration(duration_s)}")]
        if self._tokens:
            # Of an attempt whose predecessors' rows are gone it is not known how many it took.
            known = duration_s > 0 and bool(self._first_tokens or not self._first_step)
            rate = (self._tokens - self._first_tokens) / duration_s if known else 0
            average = f", {format_si(rate)}tok/s on average" if known else ""
            lines.append(labelled("tokens", f"{self._tokens:,}{average}"))
        for name, last in self._last.items():
            bpb = self._bits_per_byte.get(name.removesuffix("loss"))
            bits = "" if bpb is None else f" ({bpb:.4f} bits/byte)"
            lines.append(labelled(_label(name), f"{last}{bits}, best {self._best[name]}"))
        run = self._metrics_path.parent
        checkpoint = self._newest_checkpoint()
        lines.append(labelled("checkpoint", str(run / "checkpoints" / checkpoint) if checkpoint else "none"))
        return [*lines, labelled("run", f"{run}: {self._metrics_path.name}, log.txt, config.yaml, run.json")]

    def _take(self, record: Record) -> None:
        step = int(record["step"])
        self._tokens = int(record.get("tokens", self._tokens))
        self._skipped = int(record.get("optim/skipped_steps", self._skipped))
        for name, value in record.items():
            if name.startswith("eval/") and name.endswith("bpb"):
                self._bits_per_byte[name.removesuffix("bpb")] = value
            if name == "loss/lm" or (name.startswith("eval/") and name.endswith("/loss")):
                self._last[name] = _Loss(value, step)
                best = self._best.get(name)
                # Written so that NaN is never better, and anything is better than NaN.
                if best is None or best.value != best.value or value < best.value:
                    self._best[name] = _Loss(value, step)


def _label(name: str) -> str:
    """Of a loss: ``loss``, ``eval loss``, or ``eval NAME`` with a gap behind a long name."""
    if name == "loss/lm":
        return "loss"
    of_set = name.removeprefix("eval/").removesuffix("loss").removesuffix("/")
    return f"eval {of_set} " if of_set else "eval loss"
