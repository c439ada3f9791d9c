"""Progress of a run: the counters every rank shares, and each rank's random number generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, Strict, StringConstraints
from pydantic.dataclasses import dataclass

from qwen3next_train.data.position import SourcePosition
from qwen3next_train.errors import CheckpointError
from qwen3next_train.metrics.names import WANDB_ID
from qwen3next_train.optim.schedule import Rewarmup

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Text = Annotated[str, Strict()]
WandbId = Annotated[str, Strict(), StringConstraints(pattern=rf"\A(?:{WANDB_ID})?\z")]

_MT19937_WORDS = 624


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AcceptedChange:
    """A setting that a resume has changed.

    Args:
        key: dotted name.
        old: its value before, as JSON; of data whose content changed a digest.
        new: its value since.
        step: the last step before the change.
    """

    key: Text
    old: Any
    new: Any
    step: Count


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Lowest:
    """The lowest value of a validation metric so far, for an early end.

    Args:
        metric: its name.
        value: None while none was finite.
        step: of that value; of the first validation while none was finite.
        num_since: validations since then.
    """

    metric: Text
    value: Finite | None
    step: Count
    num_since: Count


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainState:
    """The training state apart from tensors; equal on every rank, stored as JSON in the manifest.

    Args:
        version: layout of this record.
        step: optimizer steps taken, skipped ones included.
        consumed_samples: rows taken from the present blend so far; with ``sources`` the whole data position, valid at
            any world size.
        consumed_tokens: tokens of those rows.
        flops_total: model FLOPs spent so far, all ranks.
        skipped_steps: steps left out because a gradient was not finite.
        consecutive_skips: how many of them are the newest steps.
        sources: where each source of the blend went on when the blend began; none in checkpoints of versions before it.
        former_sources: where sources that were dropped would go on.
        changes: all that resumes have changed, oldest first.
        rewarmup: the newest return to the schedule, None for none.
        validation: what a validation of this step found, by metric, as far as it is finite; empty without one.
        validation_rows: digest of the rows that the newest validation looked at, by the prefix of its metrics.
        lowest: of the metric that ``eval.patience`` looks at; None without it, and before the first validation.
        optimizer_step: updates Adam has made, for its bias correction.
        data_fingerprint: hash of the sources, tokenizer and blend that the samples come from.
        wandb_id: wandb run to go on with, empty for none.

    Raises:
        pydantic.ValidationError: a value of another type or out of range.
    """

    version: Literal[1] = 1
    step: Count
    consumed_samples: Count
    consumed_tokens: Count
    flops_total: Annotated[int, Field(ge=0, lt=2**127, strict=True)]
    skipped_steps: Count
    optimizer_step: Count
    data_fingerprint: Text
    wandb_id: WandbId = ""
    consecutive_skips: Count = 0
    sources: tuple[SourcePosition, ...] = ()
    former_sources: tuple[SourcePosition, ...] = ()
    changes: tuple[AcceptedChange, ...] = ()
    rewarmup: Rewarmup | None = None
    validation: dict[Text, Finite] = Field(default_factory=dict)
    validation_rows: dict[Text, Text] = Field(default_factory=dict)
    lowest: Lowest | None = None


def rng_state() -> dict[str, torch.Tensor]:
    """State of this process's generators (python, numpy's global one, torch CPU, torch's current CUDA device).

    Returns:
        ``python`` int64 ``[625]`` and ``numpy`` int64 ``[626]`` (Mersenne words, position, numpy's has_gauss),
        ``*_gauss`` fp64 ``[1]`` (the spare normal deviate, NaN for none), ``torch`` uint8 ``[5056]`` and, on a
        CUDA run, ``cuda`` uint8 ``[16]``.
    """
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    words_and_position = numpy_state["state"]
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*words_and_position["key"].tolist(), words_and_position["pos"], numpy_state["has_gauss"]],
            dtype=torch.int64,
        ),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, torch.Tensor]) -> None:
    """Put this process's generators where :func:`rng_state` found them.

    Generators the state or this machine lacks (CUDA) are left alone.

    Raises:
        CheckpointError: a state that no generator accepts.
    """
    try:
        gauss = state["python_gauss"].item()
        random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
        *words, position, has_gauss = state["numpy"].tolist()
        if len(words) != _MT19937_WORDS:
            raise ValueError(f"numpy state of {len(words)} words")
        key = np.array(words, dtype=np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, state["numpy_gauss"].item()))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"random generator state in the checkpoint is unusable: {error}") from error
