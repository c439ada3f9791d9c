"""Lines of the console: a logged step, and numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from qwen3next_train.metrics.sinks import Record

LINE_WIDTH = 100
"""Columns of a line where no terminal says how many it has."""

_GAP = "  "
_LABEL_WIDTH = 12
_NOTABLE_DATA_WAIT = 0.1
_EVAL_LOSS = re.compile(r"(eval/(?:([^/]+)/)?)loss")


class _Part(NamedTuple):
    """One value of a step line.

    Args:
        text: as it is printed; empty: the record lacks it.
        rank: what has a lower one is kept when the line is too long for all.
        width: columns to count for it, so that a line's parts do not come and go with a digit.
    """

    text: str
    rank: int
    width: int = 0


def format_step(
    record: Record, *, total_steps: int, eta: str = "", rate_unit: str = "FLOP/s", width: int = LINE_WIDTH
) -> str:
    """The console line of one logged step: the values that fit, in a fixed order.

    Args:
        record: the step; what it lacks is left out.
        total_steps: last step of the run.
        eta: time left, ready to print.
        rate_unit: what ``perf/tflops_per_gpu`` is called here, ``FLOP/s/gpu`` or ``FLOP/s``.
        width: columns of the line.
    """
    parts = [part for part in _parts(record, total_steps, eta, rate_unit) if part.text]
    last_rank, used = 0, -len(_GAP)
    for part in sorted(parts, key=lambda part: part.rank):
        used += len(_GAP) + max(part.width, len(part.text))
        # The step and its loss stand in every line.
        if used > width and part.rank > 1:
            break
        last_rank = part.rank
    return _GAP.join(part.text for part in parts if part.rank <= last_rank)


def format_evals(record: Record, *, total_steps: int) -> list[str]:
    """A line for each validation set; none when the record has no validation."""
    lines = []
    for metric, loss in record.items():
        if (match := _EVAL_LOSS.fullmatch(metric)) is None:
            continue
        prefix, name = match.groups()
        bits = record.get(f"{prefix}bpb")
        of_set = f"{_GAP}{name}" if name else ""
        in_bits = "" if bits is None else f"{_GAP}{bits:.4f} bits/byte"
        lines.append(f"eval {_step(record, total_steps)}{of_set}{_GAP}loss {loss:.4f}{in_bits}")
    return lines


def _step(record: Record, total_steps: int) -> str:
    return f"{int(record['step']):>{len(str(total_steps))}}/{total_steps}"


def _parts(record: Record, total_steps: int, eta: str, rate_unit: str) -> list[_Part]:
    def value(name: str, rank: int, width: int, render: Callable[[float], str]) -> _Part:
        return _Part(render(record[name]) if name in record else "", rank, width)

    dead = f"dead {record['moe/dead_experts']:.0f}" if record.get("moe/dead_experts") else ""
    skipped = f"skipped {record['optim/skipped_steps']:.0f}" if record.get("optim/skipped_steps") else ""
    return [
        _Part(f"step {_step(record, total_steps)}", 0),
        value("loss/lm", 1, 11, lambda loss: f"loss {loss:.4f}"),
        value("loss/mtp", 10, 10, lambda loss: f"mtp {loss:.4f}"),
        value("loss/load_balancing", 14, 10, lambda loss: f"aux {loss:.4f}"),
        value("optim/lr", 5, 10, lambda lr: f"lr {lr:.1e}"),
        value("optim/grad_norm", 6, 10, lambda norm: f"gnorm {short(norm)}"),
        value("perf/flops_per_step", 8, 10, lambda flops: f"{format_si(flops)}FLOP"),
        value("perf/tflops_per_gpu", 7, 6 + len(rate_unit), lambda rate: f"{format_si(rate * 1e12)}{rate_unit}"),
        value("perf/mfu", 9, 9, lambda share: f"mfu {share:.1%}"),
        value("perf/tokens_per_s", 4, 11, lambda rate: f"{format_si(rate)}tok/s"),
        _data_wait(record),
        value("mem/peak_gib", 11, 13, lambda gib: f"mem {gib:.1f} GiB"),
        value("moe/max_violation", 12, 13, lambda excess: f"moe max +{excess:.0%}"),
        _Part(dead, 13, 7),
        _Part(skipped, 2),
        _Part(eta, 3, 9),
    ]


def _data_wait(record: Record) -> _Part:
    step_time_s = record.get("perf/step_time_s")
    if "perf/data_wait_s" not in record or not step_time_s:
        return _Part("", 15)
    share = record["perf/data_wait_s"] / step_time_s
    return _Part(f"data {share:.1%}", 2 if share >= _NOTABLE_DATA_WAIT else 15, 9)


def labelled(label: str, text: str) -> str:
    """A line of what the log opens and ends with: a label and its text, in columns."""
    return f"{label:<{_LABEL_WIDTH}}{text}"


def short(value: float) -> str:
    """A positive number in four characters or a little more: three digits, or two and a power of ten."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.4g}"
    if not 0.01 <= value < 9999.5:
        return f"{value:.1e}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def format_si(value: float) -> str:
    """A number of three or four digits and a decimal prefix, such as ``2.51 M``; ends ready for a unit."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{short(value / factor)} {prefix}"
    return f"{short(value)} "


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: ``4d14h``, ``2h05m``, ``3m20s``, ``12s``."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days}d{rest_hours:02d}h"
    if hours:
        return f"{hours}h{rest_minutes:02d}m"
    return f"{minutes}m{rest_s:02d}s" if minutes else f"{rest_s}s"
