"""A tiny Hugging Face folder, written with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen3next_train.config.huggingface import MTP_KEY, model_config_to_hf
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.huggingface.names import on_disk
from qwen3next_train.parameters import parameter_table

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def tiny_model(**changes: object) -> ModelConfig:
    """One layer of each kind, three experts and one MTP depth."""
    values: dict[str, object] = {
        "vocab_size": 13,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 4,
    }
    return ModelConfig.model_validate(values | changes)


def random_tensors(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensors:
    """Every tensor of a model under its name on disk."""
    generator = torch.Generator().manual_seed(7)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for spec in parameter_table(model)
        for tensor in on_disk(spec)
    }


def write_folder(
    folder: Path, model: ModelConfig, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, **config: Any
) -> Path:
    """Write ``config.json``, as published without the MTP key, and the tensors dealt out to the shards."""
    folder.mkdir()
    fields = model_config_to_hf(model)
    del fields[MTP_KEY]
    (folder / "config.json").write_text(json.dumps(fields | config))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_folder(folder: Path) -> Tensors:
    """Every tensor of a folder by name; none twice."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = handle.get_tensor(name).clone()
    return tensors


def assert_bit_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a folder's index."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
