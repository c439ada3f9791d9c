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
from qwen3next_train.checkpoint.manager import CheckpointManager, Glance, VerifiedCheckpoint
from qwen3next_train.checkpoint.names import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    CheckpointInfo,
    describe_missing_directory,
    describe_no_checkpoint,
    directory_of_best,
    list_checkpoints,
)
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


@dataclass(frozen=True)
class NamedCheckpoint:
    """The checkpoint that a path names, of which nothing is verified yet.

    Args:
        path: as it was given.
        manager: of the directory that it lies in.
        info: which one; None: the newest intact one.
    """

    path: Path
    manager: CheckpointManager
    info: CheckpointInfo | None

    def glance(self) -> Glance | None:
        """What its manifest says: enough to refuse it before every byte is read. Collective.

        Returns:
            None where the manifest is not whole. Of the newest checkpoint, which need not be the newest intact one.

        Raises:
            StorageError: the directory cannot be listed.
        """
        return self.manager.glance(self.info)

    def verify(self) -> VerifiedCheckpoint:
        """It, every byte verified. Collective.

        Raises:
            ConfigError: there is none.
            CheckpointError: damaged, or of a newer format.
            StorageError: the directory cannot be listed, or a checkpoint cannot be read.
        """
        if self.info is not None:
            return self.manager.find(self.info)
        if (found := self.manager.find_latest()) is None:
            raise ConfigError(describe_no_checkpoint(self.path))
        return found


def name_checkpoint(path: Path, control: ControlGroup) -> NamedCheckpoint:
    """The checkpoint that a path names. Collective.

    Args:
        path: a checkpoint (``step_00001000``), a run directory or its ``checkpoints``: the newest intact one. ``best``
            in one of these two: the best (``checkpoint.best``). On a filesystem that all ranks share.
        control: the ranks, which share the verification.

    Raises:
        ConfigError: no such directory, or it has another name than a checkpoint's.
        StorageError: the directory cannot be listed.
    """
    if (of_best := directory_of_best(path)) is not None:
        manager = CheckpointManager(of_best, control=control, keep=1)
        return NamedCheckpoint(path, manager, manager.name_best())
    try:
        if (problem := describe_missing_directory(path)) is not None:
            raise ConfigError(problem)
        # The name of `.` or of a link may say nothing about the step.
        path = path.resolve()
        is_checkpoint = (path / MANIFEST_NAME).exists()
        inner = path / CHECKPOINTS_NAME
        directory = inner if inner.is_dir() else path
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({describe_os_error(error)}); make it readable") from error
    if not is_checkpoint:
        return NamedCheckpoint(path, CheckpointManager(directory, control=control, keep=1), None)
    named = list_checkpoints([path.name])
    if not named:
        raise ConfigError(f"{path}: a checkpoint under another name; call it step_ and its step in eight digits")
    return NamedCheckpoint(path, CheckpointManager(path.parent, control=control, keep=1), named[0])


def find_checkpoint(path: Path, control: ControlGroup) -> VerifiedCheckpoint:
    """The checkpoint that a path names, every byte of it verified: see :func:`name_checkpoint`. Collective."""
    return name_checkpoint(path, control).verify()


def sections_of_checkpoint(path: Path) -> tuple[ModelConfig, DataConfig] | None:
    """Model, ``layer_types`` filled in, and data section of the checkpoint that a path names; nothing is verified.

    Returns:
        None where that takes the verification: there is none, or its manifest is not whole.

    Raises:
        ConfigError: as :func:`name_checkpoint`.
        CheckpointError: its configuration does not describe its weights.
        StorageError: as :func:`name_checkpoint`.
    """
    glance = name_checkpoint(path, SingleProcess()).glance()
    return None if glance is None else _sections(glance.path, glance.config)


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
    model, data = _sections(found.path, found.manifest.config)
    parameters = parameter_table(model)
    reader = _Reader(found)
    reader.check_parameters(parameters)
    run = found.manifest.config.get("run")
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


def _sections(path: Path, config: dict[str, Any]) -> tuple[ModelConfig, DataConfig]:
    return with_layer_types(_section(path, config, "model", ModelConfig)), _section(path, config, "data", DataConfig)


def _section(path: Path, config: dict[str, Any], name: str, section: type[SectionT]) -> SectionT:
    try:
        return section.model_validate(config.get(name))
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ascii(".".join(map(str, (name, *detail["loc"]))))[1:-1]
        raise CheckpointError(
            f"{path}: {where}: {detail['msg']}; use the version of qwen3next_train that wrote the checkpoint"
        ) from error
