"""Which settings say the same learning rates, and which changes of them count."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3next_train.config.curve import curve_after
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.schema import Config
from qwen3next_train.optim.schedule import scheduled_rate


def config(
    kind: str, *, steps: int = 8, lr: float = 1e-3, warmup: int = 2, decay: int = 0, low: float = 1e-4
) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": steps},
            "optimizer": {"lr": lr},
            "schedule": {"kind": kind, "warmup_steps": warmup, "decay_steps": decay, "min_lr": low},
        }
    )


ALIKE: list[tuple[Config, Config, int]] = [
    (config("cosine"), config("cosine", decay=8), 0),
    (config("cosine", decay=8), config("cosine", steps=12, decay=8), 8),
    (config("linear"), config("linear", decay=8), 3),
    (config("linear"), config("cosine"), 8),
    (config("cosine", low=1e-3), config("constant"), 0),
    (config("constant", warmup=2), config("constant", warmup=0), 2),
    (config("constant", decay=3), config("constant", decay=5, low=0.0), 0),
    (config("wsd", steps=20), config("wsd", steps=20, decay=2), 0),
    (config("wsd", steps=20, warmup=2), config("wsd", steps=20, warmup=5), 5),
]
DIFFERENT: list[tuple[Config, Config, int, list[str]]] = [
    (config("cosine"), config("cosine", steps=12), 8, ["run.steps"]),
    (config("cosine"), config("cosine", decay=8, lr=2e-3), 0, ["optimizer.lr"]),
    (config("cosine"), config("cosine", steps=12, decay=8, lr=2e-3), 4, ["optimizer.lr"]),
    (config("cosine"), config("cosine", steps=12, decay=12), 4, ["schedule.decay_steps"]),
    (config("cosine", decay=8, steps=12), config("cosine", lr=2e-3), 4, ["optimizer.lr"]),
    (config("wsd", steps=20), config("wsd", steps=40), 20, ["run.steps"]),
    (config("linear"), config("cosine"), 4, ["schedule.kind"]),
    (config("constant"), config("constant", lr=2e-3), 4, ["optimizer.lr"]),
]


@pytest.mark.parametrize(("old", "new", "step"), ALIKE)
def test_settings_that_say_the_same_rates_are_never_refused(old: Config, new: Config, step: int) -> None:
    assert curve_after(old, step) == curve_after(new, step)
    assert compare_configs(old.model_dump(), new, step=step).trajectory == ()
    steps = range(step + 1, 30)
    assert [scheduled_rate(old, each) for each in steps] == [scheduled_rate(new, each) for each in steps]


@pytest.mark.parametrize(("old", "new", "step", "keys"), DIFFERENT)
def test_of_other_rates_the_settings_that_make_them_are_named(
    old: Config, new: Config, step: int, keys: list[str]
) -> None:
    found = compare_configs(old.model_dump(), new, step=step)
    assert [change.key for change in found.trajectory] == keys
    steps = range(step + 1, 30)
    assert [scheduled_rate(old, each) for each in steps] != [scheduled_rate(new, each) for each in steps]


def test_settings_of_the_first_weights_count_until_there_are_any() -> None:
    new = Config.model_validate({"model": {"initializer_range": 0.01, "linear_dt_init": "log_uniform"}})
    assert len(compare_configs(Config().model_dump(), new, step=0).trajectory) == 2
    assert compare_configs(Config().model_dump(), new, step=1).trajectory == ()


@pytest.mark.parametrize(
    "stored", [{"schedule": {"kind": ["wsd"]}}, {"optimizer": {"lr": -1}}, {"run": {"steps": "9"}}]
)
def test_what_is_no_schedule_of_ours_counts_as_another(stored: Any) -> None:
    (section, values) = next(iter(stored.items()))
    found = compare_configs(
        Config().model_dump() | {section: Config().model_dump()[section] | values}, Config(), step=9
    )
    assert [change.key for change in found.trajectory] == [f"{section}.{next(iter(values))}"]
