"""The ``generate`` subcommand: what finished weights make of prompts, in one process, without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from qwen3next_train.accounting.hardware import Precision
from qwen3next_train.checkpoint.weights import NO_TOKENIZER, sections_of_checkpoint, weights_of_checkpoint
from qwen3next_train.config.schema import DataConfig, ModelConfig
from qwen3next_train.data.reading import read_small_file
from qwen3next_train.data.tokenization import Tokenizer
from qwen3next_train.errors import ConfigError, DataError, DivergedError, ExitCode
from qwen3next_train.generate.decode import continue_prompts
from qwen3next_train.generate.prompts import Coder, require_room
from qwen3next_train.generate.sampling import Sampling
from qwen3next_train.huggingface.weights import weights_of_hf
from qwen3next_train.kernels.selection import DTYPES
from qwen3next_train.parallel.process_groups import select_device
from qwen3next_train.train.finished_model import load_model

_MAX_BATCH_TOKENS = 1 << 16
_MAX_PROMPTS_BYTES = 64 << 20


def generate_command(
    *,
    checkpoint: Path | None,
    hf: Path | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    sampling: Sampling,
    as_json: bool,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Precision | None = None,
    tokenizer: str | None = None,
) -> int:
    """Print each prompt with its continuation, or with ``as_json`` an object a line.

    Args:
        checkpoint: a checkpoint of ours, saved at any layout, or a run directory: its newest intact one.
        hf: a Hugging Face folder; give this or ``checkpoint``.
        prompts: texts, or token ids where the model has no tokenizer.
        prompts_file: has one prompt a line, in a ``.jsonl`` as ``{"prompt": text}``; instead of ``prompts``.
        sampling: how they go on.
        as_json: print ``{prompt, text, token_ids, finish_reason}``, ``text`` and ``token_ids`` of what is new.
        device: where to run; auto takes CUDA when present.
        precision: dtype of weights and activations; None: that of the training, or of the folder.
        tokenizer: as ``data.tokenizer``; None takes the model's own.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: an unusable device, tokenizer or prompt.
        CheckpointError: the checkpoint is damaged.
        DataError: the Hugging Face folder is damaged, or the file of prompts cannot be read.
        DivergedError: the model's logits are not finite.
    """
    labelled = _read_prompts(prompts_file) if prompts_file is not None else _labelled(prompts)
    target = select_device(device, 0, setting="--device")
    # Before every byte of the weights is verified.
    sections = None if checkpoint is None else sections_of_checkpoint(checkpoint)
    if sections is not None:
        coder, encoded = _encode(labelled, *sections, tokenizer, sampling)
    weights = weights_of_checkpoint(checkpoint) if checkpoint is not None else weights_of_hf(Path(hf or ""))
    # The newest intact checkpoint may be an older one.
    if sections != (weights.model, weights.data):
        coder, encoded = _encode(labelled, weights.model, weights.data, tokenizer, sampling)
    try:
        dtype = DTYPES[precision or weights.precision]
        model = load_model(weights, device=target, dtype=dtype, command="generate")
        continuations = continue_prompts(
            model,
            encoded,
            sampling,
            end_token_id=coder.end_token_id,
            max_batch_tokens=_MAX_BATCH_TOKENS,
            device=target,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"generate: {weights.path}: out of memory on {target}; use precision bf16, fewer or shorter prompts, or "
            "the CPU"
        ) from error
    for (label, prompt), ids, (new_ids, reason) in zip(labelled, encoded, continuations, strict=True):
        if reason == "not_finite":
            raise DivergedError(
                f"generate: {label}: the logits after {len(new_ids)} new tokens are not finite; the weights of "
                f"{weights.path} are damaged or overflow in bf16"
            )
        text = coder.decode(ids, new_ids)
        row = {"prompt": prompt, "text": text, "token_ids": new_ids, "finish_reason": reason}
        print(json.dumps(row, allow_nan=False) if as_json else _joined(prompt, text, coder))
    return ExitCode.FINISHED


def _joined(prompt: str, text: str, coder: Coder) -> str:
    return prompt + text if coder.end_token_id is not None else f"{prompt.strip()} {text}".strip()


def _encode(
    labelled: Sequence[tuple[str, str]], model: ModelConfig, data: DataConfig, tokenizer: str | None, sampling: Sampling
) -> tuple[Coder, list[list[int]]]:
    """The prompts as tokens of a model, each with room for what is to come."""
    name = data.tokenizer if tokenizer is None else tokenizer
    coder = Coder(None if name == NO_TOKENIZER else Tokenizer(name, data.eos_token), model.vocab_size)
    encoded = []
    for label, prompt in labelled:
        encoded.append(coder.encode(prompt, label))
        require_room(
            encoded[-1],
            sampling.max_new_tokens,
            model.max_position_embeddings,
            label=label,
            limit_name="max_position_embeddings",
            setting="--max-new-tokens",
        )
    return coder, encoded


def _labelled(prompts: Sequence[str]) -> list[tuple[str, str]]:
    if len(prompts) == 1:
        return [("--prompt", prompts[0])]
    return [(f"--prompt {number}", prompt) for number, prompt in enumerate(prompts, start=1)]


def _read_prompts(path: Path) -> list[tuple[str, str]]:
    """Where each prompt stands, and the prompt."""
    try:
        content = read_small_file(path, max_bytes=_MAX_PROMPTS_BYTES).decode("utf-8-sig")
    except (DataError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, DataError) else f"{path}: no UTF-8 text"
        raise ConfigError(f"--prompts: {reason}; name a file with a prompt a line") from None
    # Not splitlines, which takes a form feed or a line separator inside a prompt for an end.
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    if not content:
        raise ConfigError(f"--prompts: {path}: empty; give a prompt a line")
    labels = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, label) for line, label in zip(lines, labels, strict=True)]
    return list(zip(labels, lines, strict=True))


def _prompt_of(line: str, label: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ConfigError(f'{label}: not an object with a text under "prompt"; write {{"prompt": "..."}} on each line')
    return prompt
