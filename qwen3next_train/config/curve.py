"""What a schedule comes to: where its decay lies, and whether two of them go on alike."""

from __future__ import annotations

from qwen3next_train.config.schema import Config, ScheduleConfig
from qwen3next_train.config.validate import wsd_decay_steps

CURVE_KEYS = (
    *("run.steps", "optimizer.lr"),
    *("schedule.kind", "schedule.warmup_steps", "schedule.decay_steps", "schedule.min_lr"),
)
"""The settings that :func:`curve_after` depends on."""

Part = tuple[str | int | float, ...]


def decay_span(schedule: ScheduleConfig, run_steps: int) -> tuple[int, int]:
    """First and last step of the decay of a schedule that has one."""
    if schedule.kind == "wsd":
        return run_steps - wsd_decay_steps(schedule, run_steps), run_steps
    return schedule.warmup_steps, schedule.decay_steps or run_steps


def curve_after(config: Config, step: int) -> tuple[Part, ...]:
    """What decides the learning rate of all steps after ``step``: equal parts, equal rates.

    Settings that say the same (``decay_steps`` 0 of 8 steps and ``decay_steps`` 8), or that only parts behind read (a
    warm-up that is over), give equal parts.

    Args:
        config: the settings :data:`CURVE_KEYS` count.
        step: the last step that is done, 0 for none.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup: tuple[Part, ...] = ()
    if step + 1 < schedule.warmup_steps:
        warmup = (("warm-up", schedule.warmup_steps, peak),)
    if schedule.kind == "constant" or schedule.min_lr == peak:
        return (*warmup, ("hold", peak))
    start, end = decay_span(schedule, config.run.steps)
    if step + 1 >= end and not warmup:
        # As the formula rounds it.
        return (("hold", peak + (schedule.min_lr - peak)),)
    shape = "cosine" if schedule.kind == "cosine" else "linear"
    return (*warmup, (shape, start, end, peak, schedule.min_lr))
