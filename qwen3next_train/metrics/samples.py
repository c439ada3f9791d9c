"""Text that the model has written during training: in the log and in ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from qwen3next_train.log import get_logger
from qwen3next_train.metrics.history import MAX_ROW_BYTES, Row

_SHOWN_CHARS = 200
_BYTES_A_CHAR = 12
"""The longest that JSON makes of a character: two escaped halves."""
_BYTES_BESIDE = 256


@dataclass(frozen=True)
class Sample:
    """What a prompt goes on with.

    Args:
        prompt: the prompt.
        text: what is new.
        tokens: number of new tokens.
        finish_reason: ``stop``, ``length`` or ``not_finite`` (``generate.sampling``).
    """

    prompt: str
    text: str
    tokens: int
    finish_reason: str


class SampleSink(Protocol):
    """A destination for samples."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Take the samples of one step. Never raises for a destination that is away or full."""


def samples_row(step: int, samples: Sequence[Sample]) -> Row:
    """The row of ``samples.jsonl``: ``step`` and ``samples``, texts cut to what a row may hold."""
    chars = (MAX_ROW_BYTES // max(1, len(samples)) - _BYTES_BESIDE) // (2 * _BYTES_A_CHAR)
    cut = [asdict(sample) | {"prompt": sample.prompt[:chars], "text": sample.text[:chars]} for sample in samples]
    return {"step": step, "samples": cut}


def say_samples(step: int, samples: Sequence[Sample]) -> None:
    """Log one line a sample, control characters escaped."""
    for number, sample in enumerate(samples, start=1):
        reason = "" if sample.finish_reason == "length" else f" ({sample.finish_reason})"
        prompt, text = sample.prompt[-_SHOWN_CHARS:], sample.text[:_SHOWN_CHARS]
        get_logger().info("sample %d of step %d: %r -> %r%s", number, step, prompt, text, reason)
