"""transformers' own Qwen3-Next in a process of its own (:mod:`tests.transformers_apart`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tests.transformers_apart import transformers_apart

FIELDS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
}
"""A random model's ``Qwen3NextConfig``, nothing of it the default."""


class Transformers:
    """The process; a context manager. Importing transformers takes long, so one serves a whole test module."""

    def __enter__(self) -> Self:
        self._process = transformers_apart()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.close()

    def save_pretrained(
        self, folder: Path, *, dtype: str = "float32", max_shard_size: str = "100KB", **changes: Any
    ) -> None:
        """Let transformers write a random model."""
        self._process.call(_save, folder, FIELDS | changes, dtype=dtype, max_shard_size=max_shard_size)

    def logits(
        self, folder: Path, documents: Sequence[Sequence[int]], *, dtype: str = "float32"
    ) -> list[npt.NDArray[np.float32]]:
        """Let transformers load a folder: logits ``[tokens, vocabulary]`` of each document."""
        logits, missing_keys = self._process.call(_logits, folder, documents, dtype)
        assert missing_keys == []
        return logits  # type: ignore[no-any-return]

    def generate(
        self, folder: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_token_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Let transformers continue prompts greedily in fp32, each by itself: new ``ids`` and their ``text``, if any.

        Args:
            folder: the model.
            prompts: token ids.
            max_new_tokens: at most so many.
            end_token_id: ends a text, and is not among its ids.
        """
        return self._process.call(_generate, folder, prompts, max_new_tokens, end_token_id)  # type: ignore[no-any-return]

    def tokenize(self, folder: Path, text: str) -> dict[str, Any]:
        """Let transformers load a folder's tokenizer: ``ids`` of a text and ``eos_token``."""
        return self._process.call(_tokenize, folder, text)  # type: ignore[no-any-return]


def _save(folder: Path, fields: dict[str, Any], *, dtype: str, max_shard_size: str) -> None:
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def _logits(
    folder: Path, documents: Sequence[Sequence[int]], dtype: str
) -> tuple[list[npt.NDArray[np.float32]], list[str]]:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        logits = [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in documents]
    return [each.numpy() for each in logits], sorted(info["missing_keys"])


def _generate(
    folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_token_id: int | None
) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else None
    results = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_token_id,
            pad_token_id=0,
        )[0].tolist()
        new = ids[len(prompt) :]
        new = new[: new.index(end_token_id)] if end_token_id in new else new
        results.append({"ids": new, "text": None if tokenizer is None else tokenizer.decode(new)})
    return results


def _tokenize(folder: Path, text: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"ids": ids, "eos_token": tokenizer.eos_token}
