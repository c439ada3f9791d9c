import math

import pytest

from qwen3next_train.config.schema import Config, OptimizerConfig, RunConfig, ScheduleConfig
from qwen3next_train.optim.schedule import Rewarmup, learning_rate


def _config(kind: str, *, warmup: int = 10, decay: int = 0, steps: int = 110) -> Config:
    return Config(
        run=RunConfig(steps=steps),
        optimizer=OptimizerConfig(lr=1.0),
        schedule=ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_lr=0.1),
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step(kind: str) -> None:
    config = _config(kind)
    assert [learning_rate(config, step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_constant_stays() -> None:
    assert learning_rate(_config("constant"), 110) == 1.0


def test_linear_is_half_way_at_half_the_span_and_stays_at_the_end() -> None:
    config = _config("linear")
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)
    assert learning_rate(config, 500) == pytest.approx(0.1)


def test_cosine_equals_the_formula_at_a_quarter() -> None:
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))
    assert learning_rate(_config("cosine"), 35) == pytest.approx(expected)


def test_cosine_ends_at_decay_steps_not_at_the_end_of_the_run() -> None:
    assert learning_rate(_config("cosine", decay=60), 60) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_over_the_last_steps() -> None:
    config = _config("wsd", decay=20)
    assert [learning_rate(config, step) for step in (50, 90, 100, 110)] == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_wsd_decays_over_a_tenth_of_the_run_by_default() -> None:
    config = _config("wsd")
    assert learning_rate(config, 99) == 1.0
    assert learning_rate(config, 100) < 1.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(_config("cosine", warmup=0), 0) == 1.0


def test_a_return_to_the_schedule_is_linear_and_ends_on_it() -> None:
    config = _config("constant")
    rewarmup = Rewarmup(after_step=50, from_lr=0.2, steps=4)
    rates = [learning_rate(config, step, rewarmup) for step in (50, 51, 52, 53, 54, 55)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_return_follows_a_schedule_that_falls_meanwhile() -> None:
    config = _config("linear")
    rewarmup = Rewarmup(after_step=58, from_lr=0.0, steps=4)
    # Linear from 1 at step 10 to 0.1 at step 110: 0.55 at step 60, of which half is reached.
    assert learning_rate(config, 60, rewarmup) == pytest.approx(0.275)
    assert learning_rate(config, 62, rewarmup) == learning_rate(config, 62)


def test_an_extended_wsd_run_is_back_at_the_peak_until_its_new_decay() -> None:
    """Six steps with a decay of two, then ten: from step 7 on the rates of the longer run."""
    short, longer = (_config("wsd", warmup=2, decay=2, steps=steps) for steps in (6, 10))
    rates = [learning_rate(short, step) for step in range(1, 7)] + [
        learning_rate(longer, step) for step in range(7, 11)
    ]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.55, 0.1, 1.0, 1.0, 0.55, 0.1])


def test_an_annealed_wsd_run_falls_over_as_many_steps_as_it_is_given() -> None:
    """Four steps of a run of six, then a decay of four to step eight."""
    annealed = _config("wsd", warmup=2, decay=4, steps=8)
    assert [learning_rate(annealed, step) for step in range(4, 9)] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])
