"""``checkpoint.init_from``: the weights, and nothing but the weights, that a new run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.weights import name_checkpoint
from qwen3next_train.config.describe import compare_configs
from qwen3next_train.config.error_lines import show_stored
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import FragmentKind
from qwen3next_train.errors import CheckpointError, ConfigError
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup
from qwen3next_train.parameters import parameter_table

_MEANING_OF_WEIGHTS = frozenset(
    f"model.{name}"
    for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "num_experts_per_tok", "norm_topk_prob")
)
"""Settings that no tensor's shape shows, and under which the same weights compute something else."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights of a verified checkpoint of the same model.

    Args:
        path: the checkpoint.
        reader: reads it.
    """

    path: Path
    reader: FragmentReader

    def read(self, name: str, kind: FragmentKind, start: int, stop: int) -> torch.Tensor:
        """See ``engine.base.ReadFragment``. The optimizer's moments start at zero, whatever the checkpoint holds."""
        if kind == "master":
            return self.reader.read(name, kind, start, stop)
        return torch.zeros(stop - start)


def find_initial_weights(config: Config, control: ControlGroup) -> InitialWeights | None:
    """Find and verify ``checkpoint.init_from``; None when it is not set. Collective.

    Args:
        config: the resolved configuration of the new run.
        control: the ranks, which share the verification.

    Raises:
        ConfigError: there is no checkpoint at that place.
        CheckpointError: it is damaged, or of another model.
        StorageError: the place cannot be listed.
    """
    if not config.checkpoint.init_from:
        return None
    try:
        named = name_checkpoint(Path(config.checkpoint.init_from), control)
        # Before a terabyte is verified for nothing.
        if (glance := named.glance()) is not None:
            _require_same_model(glance.path, glance.config, config)
        found = named.verify()
        _require_same_model(found.path, found.manifest.config, config)
        reader = FragmentReader(found.path, found.manifest)
        reader.check_parameters(parameter_table(config.model))
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"checkpoint.init_from: {error}") from error
    for change in compare_configs(found.manifest.config, config).trajectory:
        if change.key in _MEANING_OF_WEIGHTS:
            get_logger().warning(
                "checkpoint.init_from: the weights were trained with %s %s, now %s",
                change.key,
                show_stored(change.old),
                change.new,
            )
    return InitialWeights(found.path, reader)


def _require_same_model(path: Path, recorded: Mapping[str, Any], config: Config) -> None:
    # Equal tensors can be cut into heads in more than one way.
    if changes := compare_configs(recorded, config).shape:
        change = changes[0]
        raise CheckpointError(
            f"{path}: checkpoint of another model: {change.key} was {show_stored(change.old)}, now "
            f"{show_stored(change.new)}; use the model section of the run that wrote it"
        )
