"""The weights of a finished model, wherever they lie: what evaluation, export and a new run start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.checkpoint.filesystem import describe_os_error
from qwen3next_train.checkpoint.fragments import FragmentReader
from qwen3next_train.checkpoint.manager import CheckpointManager, VerifiedCheckpoint
from qwen3next_train.checkpoint.names import CHECKPOINTS_NAME, MANIFEST_NAME, list_checkpoints
from qwen3next_train.checkpoint.publication import BEST_NAME
from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.schema import DataConfig, ModelConfig
from qwen3next_train.errors import CheckpointError, ConfigError, StorageError
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from qwen3next_train.parameters import ParamSpec, parameter_table

ReadWeight = Callable[[str, int, int], torch.Tensor]
"""``read(name, start, stop)``: fp32 elements ``[start, stop)`` of the flattened logical tensor, on the host."""

NO_TOKENIZER = ""
"""``data.tokenizer`` of weights that came without one."""

_MAPPED_ELEMENTS = 1 << 29

SectionT = TypeVar("SectionT", bound=BaseModel)


@dataclass(frozen=True)
class Weights:
    """A model's configuration and weights.

    Args:
        path: the checkpoint or folder.
        model: the model section, ``layer_types`` filled in.
        data: tokenizer (:data:`NO_TOKENIZER` for none) and row settings that belong to the model.
        parameters: the parameter table of ``model``.
        read: gives the weights.
        precision: dtype of weights and activations in training.
    """

    path: Path
    model: ModelConfig
    data: DataConfig
    parameters: tuple[ParamSpec, ...]
    read: ReadWeight
    precision: Precision


def find_checkpoint(path: Path, control: ControlGroup) -> VerifiedCheckpoint:
    """The checkpoint that a path names, every byte of it verified. Collective.

    Args:
        path: a checkpoint (``step_00001000``), a run directory or its ``checkpoints``: the newest intact one. ``best``
            in one of these two: the best (``checkpoint.best``). On a filesystem that all ranks share.
        control: the ranks, which share the verification.

    Raises:
        ConfigError: no such directory, or no checkpoint in it.
        CheckpointError: damaged, or of a newer format.
        StorageError: the directory cannot be listed, or a checkpoint cannot be read.
    """
    if (of_best := directory_of_best(path)) is not None:
        return CheckpointManager(of_best, control=control, keep=1).find_best()
    try:
        if not path.is_dir():
            raise ConfigError(f"{path}: not a directory; name a run directory or one of its checkpoints")
        # The name of `.` or of a link may say nothing about the step.
        path = path.resolve()
        is_checkpoint = (path / MANIFEST_NAME).exists()
        inner = path / CHECKPOINTS_NAME
        directory = inner if inner.is_dir() else path
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({describe_os_error(error)}); make it readable") from error
    if not is_checkpoint:
        found = CheckpointManager(directory, control=control, keep=1).find_latest()
        if found is None:
            raise ConfigError(f"{path}: no checkpoint in it; name a run directory or one of its checkpoints")
        return found
    named = list_checkpoints([path.name])
    if not named:
        raise ConfigError(f"{path}: a checkpoint under another name; call it step_ and its step in eight digits")
    return CheckpointManager(path.parent, control=control, keep=1).find(named[0])


def directory_of_best(path: Path) -> Path | None:
    """The checkpoints directory whose best one a path names; None where the path names something else.

    Raises:
        StorageError: it cannot be told now.
    """
    if path.name != BEST_NAME:
        return None
    try:
        if path.is_dir() or not path.parent.is_dir():
            return None
        parent = path.parent.resolve()
        inner = parent / CHECKPOINTS_NAME
        return inner if inner.is_dir() else parent
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({describe_os_error(error)}); make it readable") from error


def weights_of_checkpoint(path: Path) -> Weights:
    """Open the weights of a checkpoint of ours.

    Args:
        path: as for :func:`find_checkpoint`.

    Raises:
        ConfigError: as :func:`find_checkpoint`.
        CheckpointError: as :func:`find_checkpoint`, or its configuration does not describe its weights.
        StorageError: as :func:`find_checkpoint`.
    """
    found = find_checkpoint(path, SingleProcess())
    model = with_layer_types(_section(found, "model", ModelConfig))
    parameters = parameter_table(model)
    reader = _Reader(found)
    reader.check_parameters(parameters)
    data, run = _section(found, "data", DataConfig), found.manifest.config.get("run")
    precision = run.get("precision") if isinstance(run, dict) else None
    return Weights(found.path, model, data, parameters, reader.read, "fp32" if precision == "fp32" else "bf16")


class _Reader:
    """Weights of a checkpoint, with a bounded part of its files mapped."""

    def __init__(self, found: VerifiedCheckpoint) -> None:
        self._found = found
        self._fragments = FragmentReader(found.path, found.manifest)
        self._num_read = 0

    def check_parameters(self, parameters: tuple[ParamSpec, ...]) -> None:
        """See ``FragmentReader.check_parameters``."""
        self._fragments.check_parameters(parameters)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``ReadWeight``."""
        self._num_read += stop - start
        if self._num_read > _MAPPED_ELEMENTS:
            # What has been read of a mapped file counts as this process's memory until the file is unmapped.
            self._fragments = FragmentReader(self._found.path, self._found.manifest)
            self._num_read = stop - start
        return self._fragments.read(name, "master", start, stop)


def _section(found: VerifiedCheckpoint, name: str, section: type[SectionT]) -> SectionT:
    value: Any = found.manifest.config.get(name)
    try:
        return section.model_validate(value)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ascii(".".join(map(str, (name, *detail["loc"]))))[1:-1]
        raise CheckpointError(
            f"{found.path}: {where}: {detail['msg']}; use the version of qwen3next_train that wrote the checkpoint"
        ) from error
