"""The weights of a Hugging Face folder as logical parameters, every tensor accounted for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.checkpoint.weights import NO_TOKENIZER, Weights
from qwen3next_train.config.error_lines import show, show_name
from qwen3next_train.config.huggingface import MTP_KEY, model_config_from_hf
from qwen3next_train.config.schema import DataConfig, ModelConfig
from qwen3next_train.errors import DataError
from qwen3next_train.huggingface.folder import CONFIG_NAME, HfFolder, StoredTensor
from qwen3next_train.huggingface.names import (
    EMBEDDING,
    HEAD,
    MTP_PREFIX,
    HfTensor,
    in_memory,
    mtp_layer,
    num_mtp_layers,
    on_disk,
)
from qwen3next_train.parameters import ParamSpec, parameter_table

TOKENIZER_NAME = "tokenizer.json"

_DTYPES = ("F32", "BF16", "F16")
_LARGEST = {"num_hidden_layers": 1024, MTP_KEY: 64, "num_experts": 8192}
_MAX_NAMED = 3
_COMPARED_NUMEL = 1 << 24


@dataclass(frozen=True)
class HfMatch:
    """A folder's tensors matched with the parameters of the model that its ``config.json`` describes.

    Args:
        folder: the folder.
        model: the model, with the MTP depths it is to have.
        parameters: its parameter table.
        tensors: what each tensor of the folder is, by name; those left out are not in it.
        absent: parameters of MTP depths that the folder does not hold.
        num_left_out: tensors of MTP depths that were not asked for.
        has_head_copy: the folder of a model with tied embeddings holds the head as well; left out, it is equal.
    """

    folder: HfFolder
    model: ModelConfig
    parameters: tuple[ParamSpec, ...]
    tensors: dict[str, HfTensor]
    absent: tuple[ParamSpec, ...]
    num_left_out: int
    has_head_copy: bool


def match_folder(folder: HfFolder, *, mtp_num_layers: int | None) -> HfMatch:
    """Find for every parameter the tensors that hold it, and for every tensor its parameter.

    Args:
        folder: the folder.
        mtp_num_layers: MTP depths of the model; None: those the folder holds weights of. transformers drops
            ``mtp.*`` when it saves and keeps the key of ``config.json``, and the published ``config.json`` has no
            key although the weights are there, so it is the weights that count.

    Raises:
        ConfigError: ``config.json`` is of another model.
        DataError: a tensor is missing, surplus, misshaped or of a dtype that holds no plain weights; tied embeddings
            and head differ.
    """
    held = num_mtp_layers(folder.tensors)
    depths = mtp_num_layers
    if depths is None:
        depths = (folder.config.get(MTP_KEY) or held) if held else 0
    settings = {**folder.config, MTP_KEY: depths}
    _require_plausible(folder, settings)
    model = model_config_from_hf(settings, str(folder.path / CONFIG_NAME))
    parameters = parameter_table(model)
    asked_for_more = mtp_num_layers is not None and mtp_num_layers > held
    absent = tuple(spec for spec in parameters if asked_for_more and _beyond(spec.name, held))
    left_out = {name for name in folder.tensors if mtp_num_layers is not None and _beyond(name, mtp_num_layers)}
    wanted: dict[str, HfTensor] = {}
    for spec in parameters:
        if spec not in absent:
            tensors = (in_memory(spec),) if spec.name in folder.tensors else on_disk(spec)
            wanted |= {tensor.name: tensor for tensor in tensors}
    copies = _tie(wanted, folder.tensors) if model.tie_word_embeddings else {}
    _require_same_tensors(folder, wanted | copies, left_out)
    for copy in copies.values():
        _require_equal_weights(folder, copy.name, copy.parameter)
    return HfMatch(folder, model, parameters, wanted, absent, len(left_out), bool(copies))


def weights_of_hf(path: Path) -> Weights:
    """Open the weights of a Hugging Face folder for evaluation: without MTP, which next-token prediction ignores.

    Raises:
        ConfigError: as :func:`match_folder`.
        DataError: as :func:`match_folder` and :class:`HfFolder`.
    """
    folder = HfFolder(path)
    match = match_folder(folder, mtp_num_layers=0)
    # The newer name first; without any, transformers takes fp32.
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32"
    precision: Precision = "fp32" if dtype == "float32" else "bf16"
    data = data_config(folder, match.model, path)
    return Weights(path, match.model, data, match.parameters, _Reader(match).read, precision)


def data_config(folder: HfFolder, model: ModelConfig, tokenizer: Path) -> DataConfig:
    """Data section of a model from a folder.

    Args:
        folder: the folder.
        model: its model.
        tokenizer: where its tokenizer lies, if it has one.
    """
    default = DataConfig()
    name = str(tokenizer.absolute()) if folder.has(TOKENIZER_NAME) else NO_TOKENIZER
    length = min(default.sequence_length, model.max_position_embeddings)
    return default.model_copy(update={"tokenizer": name, "sequence_length": length})


class _Reader:
    """Ranges of logical parameters out of a matched folder."""

    def __init__(self, match: HfMatch) -> None:
        self._folder = match.folder
        self._tensors: dict[str, list[HfTensor]] = {}
        for tensor in match.tensors.values():
            self._tensors.setdefault(tensor.parameter, []).append(tensor)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See ``ReadWeight``."""
        tensors = self._tensors[name]
        result = torch.empty(stop - start)
        index = bisect_right(tensors, start, key=lambda tensor: tensor.start) - 1
        done = start
        while done < stop:
            tensor = tensors[index]
            end = min(tensor.stop, stop)
            flat = self._folder.tensor(tensor.name).reshape(-1)
            result[done - start : end - start] = flat[done - tensor.start : end - tensor.start]
            done, index = end, index + 1
        return result


def _require_plausible(folder: HfFolder, settings: Mapping[str, Any]) -> None:
    # Before anything is built from it: a config.json may claim any number of layers and experts.
    for name, largest in _LARGEST.items():
        value = settings.get(name)
        if isinstance(value, int) and value > largest:
            raise DataError(f"{folder.path / CONFIG_NAME}: {name}: more than {largest} (got {show(value)})")


def _beyond(name: str, depths: int) -> bool:
    """Whether a tensor or parameter belongs to an MTP that has more than ``depths`` layers."""
    if depths == 0:
        return name.startswith(MTP_PREFIX)
    layer = mtp_layer(name)
    return layer is not None and layer >= depths


def _tie(wanted: dict[str, HfTensor], found: Mapping[str, StoredTensor]) -> dict[str, HfTensor]:
    """What the head of a model with tied embeddings is, if the folder holds it: a copy of the embedding.

    Some tools save both names. One that keeps the first name of shared weights keeps the head's: ``wanted`` then gets
    the embedding under that name.
    """
    if HEAD not in found:
        return {}
    head = replace(wanted[EMBEDDING], name=HEAD)
    if EMBEDDING in found:
        return {HEAD: head}
    del wanted[EMBEDDING]
    wanted[HEAD] = head
    return {}


def _require_equal_weights(folder: HfFolder, copy: str, original: str) -> None:
    pieces = (folder.tensor(name).reshape(-1).split(_COMPARED_NUMEL) for name in (copy, original))
    if not all(torch.equal(left.float(), right.float()) for left, right in zip(*pieces, strict=True)):
        raise DataError(
            f"{folder.path}: {copy} is not equal to {original}, though {CONFIG_NAME} has tie_word_embeddings; set it "
            "to false there, or remove the tensor"
        )


def _require_same_tensors(folder: HfFolder, wanted: dict[str, HfTensor], left_out: set[str]) -> None:
    found = folder.tensors
    differences = [f"{name} is missing" for name in wanted if name not in found]
    differences += [
        f"{show_name(name)} is not part of the model" for name in found if name not in wanted and name not in left_out
    ]
    for name, tensor in wanted.items():
        if name in found and found[name].shape != tensor.shape:
            differences.append(f"{name} has shape {list(found[name].shape)}, the model wants {list(tensor.shape)}")
        elif name in found and found[name].dtype not in _DTYPES:
            differences.append(f"{name} has dtype {found[name].dtype}, not one of {', '.join(_DTYPES)}")
    if differences:
        raise DataError(f"{folder.path}: weights and config.json do not agree: {_list_first(differences)}")


def _list_first(differences: Sequence[str]) -> str:
    more = len(differences) - _MAX_NAMED
    listed = "; ".join(differences[:_MAX_NAMED])
    return listed if more <= 0 else f"{listed} (and {more} more differences)"
