"""The ``export-hf`` subcommand: a checkpoint of ours becomes a folder that transformers and vLLM load.

Weights are read shard by shard, so memory holds one shard and one tensor. ``mtp.*`` is written under the published
names, which transformers passes over and vLLM's ``qwen3_next_mtp`` loads.

Which dtype a tensor gets: that of ``dtype``, save that the parameters which train in fp32 by nature (``A_log``,
``dt_bias``, the router) are never rounded. With ``bf16`` each of them is bf16 where that is exact, as for weights
imported from a bf16 checkpoint, else fp32, as Qwen publishes Qwen3.5's ``A_log``. Every loader converts what it reads
to its own parameter's dtype, so those that keep such a parameter in fp32 gain, and the others lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, format_bytes, write_file
from qwen3next_train.checkpoint.staged_folder import staged_folder
from qwen3next_train.checkpoint.tensor_file import StoredTensor, write_tensor_file
from qwen3next_train.checkpoint.weights import NO_TOKENIZER, Weights, weights_of_checkpoint
from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.config.huggingface import model_config_to_hf
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.errors import ConfigError, ExitCode
from qwen3next_train.huggingface.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from qwen3next_train.huggingface.import_folder import TOKENIZER_FILES
from qwen3next_train.huggingface.names import HfTensor, on_disk
from qwen3next_train.huggingface.weights import TOKENIZER_NAME
from qwen3next_train.log import get_logger

ExportDtype = Literal["bf16", "fp32"]

MAX_SHARD_BYTES = 5_000_000_000
"""Largest shard unless another size is asked for."""

_DTYPES: dict[ExportDtype, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp32": (torch.float32, "float32"),
}
_GENERATION_NAME = "generation_config.json"
_TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_SPECIAL_TOKENS_NAME = "special_tokens_map.json"


@dataclass(frozen=True)
class _Planned:
    """One tensor to write."""

    tensor: HfTensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel * self.dtype.itemsize


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: ExportDtype = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
) -> int:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a checkpoint, or a run directory: its newest intact one.
        output: folder to create; it appears whole or not at all.
        dtype: of the weights.
        max_shard_bytes: largest shard, unless a single tensor is larger.
        tokenizer: what to put beside the weights, as ``data.tokenizer``; None takes the run's own.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: ``output`` exists, or there is no such checkpoint, tokenizer or counterpart of the model.
        CheckpointError: the checkpoint is damaged.
        StorageError: ``output`` cannot be written.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"export-hf: {max_shard_bytes} bytes a shard; give a positive number")
    weights = weights_of_checkpoint(checkpoint)
    config = model_config_to_hf(weights.model)
    text_files, eos_token_id = _tokenizer_files(weights, tokenizer)
    torch_dtype, dtype_name = _DTYPES[dtype]
    config |= {"dtype": dtype_name, "torch_dtype": dtype_name}
    if weights.model.mtp_num_layers:
        # Where vLLM looks for the number of MTP depths.
        config["num_nextn_predict_layers"] = weights.model.mtp_num_layers
    if eos_token_id is not None:
        config["eos_token_id"] = eos_token_id
    text_files[CONFIG_NAME] = _encode(config)
    shards = _cut(_plan(weights, torch_dtype), max_shard_bytes)
    num_bytes = sum(planned.num_bytes for shard in shards for planned in shard)
    with staged_folder(LOCAL_FILESYSTEM, output, what="export-hf", num_bytes=num_bytes) as staged:
        _write_weights(weights, shards, staged, num_bytes)
        for name, content in text_files.items():
            write_file(LOCAL_FILESYSTEM, staged / name, content)
    print(f"{output}: {format_bytes(num_bytes)} in {len(shards)} {'shard' if len(shards) == 1 else 'shards'}, {dtype}")
    return ExitCode.FINISHED


def _plan(weights: Weights, dtype: torch.dtype) -> list[_Planned]:
    planned = []
    for spec in weights.parameters:
        own = dtype
        if spec.fp32 and dtype != torch.float32:
            value = weights.read(spec.name, 0, spec.numel)
            own = dtype if torch.equal(value.to(dtype).to(torch.float32), value) else torch.float32
        planned += [_Planned(tensor, own) for tensor in on_disk(spec)]
    return planned


def _cut(planned: Sequence[_Planned], max_shard_bytes: int) -> list[list[_Planned]]:
    """Consecutive tensors into shards."""
    shards: list[list[_Planned]] = [[]]
    size = 0
    for each in planned:
        if shards[-1] and size + each.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.num_bytes
    return shards


def _write_weights(weights: Weights, shards: Sequence[Sequence[_Planned]], staged: Path, num_bytes: int) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [StoredTensor(each.tensor.name, _read(weights, each), each.dtype) for each in shard]
        record = write_tensor_file(LOCAL_FILESYSTEM, staged / name, tensors)
        weight_map |= {each.tensor.name: name for each in shard}
        get_logger().info("export-hf: %s, %s", name, format_bytes(record.size))
        # Before the next shard is read.
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(LOCAL_FILESYSTEM, staged / INDEX_NAME, _encode(index))


def _read(weights: Weights, planned: _Planned) -> torch.Tensor:
    tensor = planned.tensor
    return weights.read(tensor.parameter, tensor.start, tensor.stop).to(planned.dtype).view(tensor.shape)


def _tokenizer_files(weights: Weights, asked: str | None) -> tuple[dict[str, bytes], int | None]:
    """Tokenizer and generation settings by file name, the latter always, and the end-of-document token."""
    without = {_GENERATION_NAME: _encode({"do_sample": False})}, None
    name = weights.data.tokenizer if asked is None else asked
    if name == NO_TOKENIZER:
        get_logger().warning("export-hf: the checkpoint has no tokenizer and none is written; name one if you have it")
        return without
    tokenizer = Tokenizer(name, weights.data.eos_token)
    if asked is None and tokenizer.num_ids > weights.model.vocab_size:
        # A run on ready tokens never opened its data.tokenizer, which may be the default.
        get_logger().warning(
            "export-hf: data.tokenizer %s is not the model's and is not written; name the right one", name
        )
        return without
    tokenizer.require_vocab_size(weights.model.vocab_size)
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    made: dict[str, Any] = {
        _GENERATION_NAME: {"do_sample": False, **eos},
        _TOKENIZER_CONFIG_NAME: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.eos_token,
            "model_max_length": weights.model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    }
    copied = {file: _with_end_token(file, content, tokenizer) for file, content in _copied_files(name).items()}
    return {file: _encode(value) for file, value in made.items()} | copied, tokenizer.eos_token_id


def _with_end_token(file: str, content: bytes, tokenizer: Tokenizer) -> bytes:
    """A file of the tokenizer's folder, changed only where it names another end-of-document token than the model's."""
    if file not in (_TOKENIZER_CONFIG_NAME, _SPECIAL_TOKENS_NAME, _GENERATION_NAME):
        return content
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"export-hf: {file} of the tokenizer is damaged ({json_problem(error)}); name another tokenizer"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"export-hf: {file} of the tokenizer is not a JSON object; name another tokenizer")
    key = "eos_token_id" if file == _GENERATION_NAME else "eos_token"
    named = settings.get(key)
    if file == _GENERATION_NAME:
        agrees = named is None or tokenizer.eos_token_id in (named if isinstance(named, list) else [named])
        value: object = tokenizer.eos_token_id
    else:
        agrees = (named.get("content") if isinstance(named, dict) else named) == tokenizer.eos_token
        value = tokenizer.eos_token
    return content if agrees else _encode({**settings, key: value})


def _copied_files(name: str) -> dict[str, bytes]:
    """The files a tokenizer consists of already."""
    if name == BUILTIN:
        asset = files("qwen3next_train.data").joinpath("assets", "python-4k", TOKENIZER_NAME)
        return {TOKENIZER_NAME: asset.read_bytes()}
    path = Path(name)
    sources = {file: path / file for file in TOKENIZER_FILES} if path.is_dir() else {TOKENIZER_NAME: path}
    try:
        return {file: source.read_bytes() for file, source in sources.items() if source.is_file()}
    except OSError as error:
        raise ConfigError(f"export-hf: {path}: cannot be read ({error.strerror}); name another tokenizer") from error


def _encode(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
