"""The global batch of every step: constant, or growing at first; a pure function of the step, as the learning rate is.

``schedule.rampup_batch_size: [START, INCREMENT, SAMPLES]`` means what it means to Megatron-LM: of the N = (final -
START) / INCREMENT increments, as many have been added as N-ths of SAMPLES have been taken, and after SAMPLES samples
the batch is ``run.global_batch_size``. The samples counted are those of this schedule from step 1 on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from qwen3next_train.config.schema import Config

BATCH_KEYS = ("run.global_batch_size", "schedule.rampup_batch_size")
"""The settings that decide the batch of a step."""


class Level(NamedTuple):
    """Steps of one batch size.

    Args:
        first_step: the first of them, from 1.
        samples_before: samples taken before it.
        size: rows of each step's batch.
    """

    first_step: int
    samples_before: int
    size: int


def batch_size(config: Config, step: int) -> int:
    """Rows of the global batch of a step (the first step is 1)."""
    return _at(_levels_of(config), step).size


def common_batch_size(config: Config) -> int:
    """The most rows that the batches of all steps are a multiple of: how they divide over ranks, all of them do."""
    return math.gcd(config.run.global_batch_size, *config.schedule.rampup_batch_size[:2])


def batch_sizes_after(config: Config, step: int) -> Iterator[int]:
    """Rows of the global batches of the steps after ``step``, without end."""
    return (batch_size(config, each) for each in count(step + 1))


def levels_after(config: Config, step: int) -> tuple[tuple[int, int], ...]:
    """First step and size of every level that steps after ``step`` have: equal levels, equal batches."""
    levels = _levels_of(config)
    later = [level for level in levels if level.first_step > step + 1]
    return ((step + 1, batch_size(config, step + 1)), *((level.first_step, level.size) for level in later))


def samples_through(config: Config, step: int) -> int:
    """Samples of the steps up to ``step``."""
    level = _at(_levels_of(config), step + 1)
    return level.samples_before + (step + 1 - level.first_step) * level.size


def steps_for(config: Config, num_samples: int) -> int:
    """The fewest steps that take ``num_samples`` samples."""
    levels = _levels_of(config)
    level = levels[bisect_right([each.samples_before for each in levels], max(num_samples - 1, 0)) - 1]
    return level.first_step - 1 + -(-(num_samples - level.samples_before) // level.size)


def describe_rampup(config: Config) -> str:
    """How the batch grows, for people; empty where it does not."""
    if len(_levels_of(config)) == 1:
        return ""
    start, increment, samples = config.schedule.rampup_batch_size
    full = steps_for(config, samples) + 1
    return (
        f"{start:,} rows at first, {increment:,} more at a time, {config.run.global_batch_size:,} from step {full:,} on"
    )


def _at(levels: tuple[Level, ...], step: int) -> Level:
    return levels[bisect_right(levels, step, key=lambda level: level.first_step) - 1]


def _levels_of(config: Config) -> tuple[Level, ...]:
    return _levels(config.run.global_batch_size, tuple(config.schedule.rampup_batch_size))


@lru_cache(maxsize=64)
def _levels(final: int, rampup: tuple[int, ...]) -> tuple[Level, ...]:
    if len(rampup) != 3 or rampup[0] >= final:
        return (Level(1, 0, final),)
    start, increment, samples = rampup
    num_increments = max((final - start) // increment, 1)
    levels = []
    step, taken = 1, 0
    while taken < samples:
        added = taken * num_increments // samples
        size = start + added * increment
        end = -(-(added + 1) * samples // num_increments)
        levels.append(Level(step, taken, size))
        num_steps = -(-(end - taken) // size)
        step, taken = step + num_steps, taken + num_steps * size
    return (*levels, Level(step, taken, final))
