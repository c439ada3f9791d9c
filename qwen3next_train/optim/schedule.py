"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from qwen3next_train.config.schema import Config, ScheduleConfig
from qwen3next_train.config.validate import wsd_decay_steps


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step ``step`` (the first step is 1).

    Warm-up is linear and reaches ``optimizer.lr`` at step ``warmup_steps``. After it: ``constant`` stays;
    ``linear`` and ``cosine`` reach ``min_lr`` at ``decay_steps`` (0: ``run.steps``) and stay there; ``wsd``
    stays and falls linearly to ``min_lr`` over the last ``decay_steps`` steps of the run (0: a tenth of it)
    (warmup-stable-decay, arXiv 2404.06395).
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    start, end = _decay_span(schedule, config.run.steps)
    fraction = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if schedule.kind == "cosine":
        fraction = 0.5 * (1.0 - math.cos(math.pi * fraction))
    return peak + (schedule.min_lr - peak) * fraction


def _decay_span(schedule: ScheduleConfig, run_steps: int) -> tuple[int, int]:
    """First and last step of the decay."""
    if schedule.kind == "wsd":
        return run_steps - wsd_decay_steps(schedule, run_steps), run_steps
    return schedule.warmup_steps, schedule.decay_steps or run_steps
