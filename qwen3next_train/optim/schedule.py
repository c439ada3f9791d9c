"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from qwen3next_train.config.curve import decay_span
from qwen3next_train.config.schema import Config


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Rewarmup:
    """A return to the schedule that begins behind a change; part of the training state.

    Args:
        after_step: the last step before it.
        from_lr: the rate it begins at.
        steps: after so many steps the rate is the schedule's.
    """

    after_step: Annotated[int, Field(ge=0, lt=2**62, strict=True)]
    from_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Annotated[int, Field(gt=0, lt=2**62, strict=True)]


def learning_rate(config: Config, step: int, rewarmup: Rewarmup | None = None) -> float:
    """Learning rate of optimizer step ``step`` (the first step is 1).

    During a re-warm-up, step ``after_step + k`` of its ``steps`` N has the rate ``from_lr`` + k / N of the distance to
    the schedule's rate of that step.
    """
    scheduled = scheduled_rate(config, step)
    if rewarmup is None or step >= rewarmup.after_step + rewarmup.steps:
        return scheduled
    fraction = (step - rewarmup.after_step) / rewarmup.steps
    return rewarmup.from_lr + (scheduled - rewarmup.from_lr) * fraction


def scheduled_rate(config: Config, step: int) -> float:
    """What the ``schedule`` section says for a step.

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
    start, end = decay_span(schedule, config.run.steps)
    fraction = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if schedule.kind == "cosine":
        fraction = 0.5 * (1.0 - math.cos(math.pi * fraction))
    return peak + (schedule.min_lr - peak) * fraction
