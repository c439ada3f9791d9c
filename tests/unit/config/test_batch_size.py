"""The batch of each step against Megatron-LM's rule, written out, and by hand."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from qwen3next_train.config.batch_size import (
    batch_size,
    batch_sizes_after,
    common_batch_size,
    describe_rampup,
    samples_through,
    steps_for,
)
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.schema import Config


def config(final: int = 8, rampup: list[int] | None = None, **run: Any) -> Config:
    return Config.model_validate(
        {"run": {"global_batch_size": final, **run}, "schedule": {"rampup_batch_size": rampup or []}}
    )


def megatron(final: int, start: int, increment: int, samples: int, num_steps: int) -> list[int]:
    """``RampupBatchsizeNumMicroBatchesCalculator`` of Megatron-LM (core/num_microbatches_calculator.py)."""
    sizes, consumed = [], 0
    samples_per_increment = samples / ((final - start) // increment)
    for _ in range(num_steps):
        size = final
        if consumed <= samples:
            size = min(start + int(consumed / samples_per_increment) * increment, final)
        sizes.append(size)
        consumed += size
    return sizes


def test_without_a_ramp_up_every_step_has_the_same() -> None:
    assert [batch_size(config(), step) for step in (1, 2, 1000)] == [8, 8, 8]
    assert samples_through(config(), 12) == 96
    assert [steps_for(config(), samples) for samples in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_a_ramp_up_by_hand() -> None:
    # From 2 to 8 in three increments of 2, one every 10 samples.
    growing = config(8, [2, 2, 30])
    sizes = [2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 8, 8]
    assert [batch_size(growing, step) for step in range(1, 13)] == sizes
    assert [samples_through(growing, step) for step in range(13)] == [sum(sizes[:step]) for step in range(13)]
    assert list(islice(batch_sizes_after(growing, 7), 4)) == [4, 6, 6, 8]
    for samples in range(1, 60):
        steps = steps_for(growing, samples)
        assert samples_through(growing, steps - 1) < samples <= samples_through(growing, steps)


def test_a_ramp_up_in_words() -> None:
    """10 samples are taken by three steps of 4."""
    assert describe_rampup(config(8)) == ""
    assert describe_rampup(config(8, [4, 4, 10])) == "4 rows at first, 4 more at a time, 8 from step 4 on"


def test_what_divides_all_batches() -> None:
    """Of 12, 20, 28 and 36 rows, 4 are the most that each is a multiple of."""
    assert common_batch_size(config(8)) == 8
    assert common_batch_size(config(36, [12, 8, 100])) == 4


@pytest.mark.parametrize(
    ("final", "start", "increment", "samples"),
    [(8, 2, 2, 30), (512, 32, 32, 100_000), (256, 16, 48, 777), (64, 2, 2, 5), (10, 1, 3, 1), (6, 4, 2, 4)],
)
def test_batches_are_megatrons(final: int, start: int, increment: int, samples: int) -> None:
    growing = config(final, [start, increment, samples])
    assert list(islice(batch_sizes_after(growing, 0), 700)) == megatron(final, start, increment, samples, 700)


@pytest.mark.parametrize(
    ("old", "new", "step", "keys"),
    [
        (config(8, [2, 2, 30]), config(8), 10, []),
        (config(8, [2, 2, 30]), config(8), 9, ["schedule.rampup_batch_size"]),
        (config(8), config(16), 4, ["run.global_batch_size"]),
        (config(8), config(16, [8, 8, 64]), 4, ["run.global_batch_size", "schedule.rampup_batch_size"]),
        (config(8), config(16, [8, 8, 64]), 20, ["run.global_batch_size"]),
    ],
)
def test_only_batches_that_follow_count(old: Config, new: Config, step: int, keys: list[str]) -> None:
    assert [change.key for change in compare_configs(old.model_dump(), new, step=step).trajectory] == keys
