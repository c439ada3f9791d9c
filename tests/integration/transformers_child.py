"""transformers' own Qwen3-Next in a process of its own, where FLA and causal-conv1d cannot be imported.

transformers takes those libraries' kernels wherever it finds them, and they crash on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_ROOT = Path(__file__).parents[2]

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

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> Self:
        self._stderr = self._log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.transformers_child"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        # Closes its standard input, at the end of which it ends.
        self._process.communicate()
        self._stderr.close()

    def save_pretrained(
        self, folder: Path, *, dtype: str = "float32", max_shard_size: str = "100KB", **changes: Any
    ) -> None:
        """Let transformers write a random model."""
        self._call("save", folder=str(folder), dtype=dtype, max_shard_size=max_shard_size, fields=FIELDS | changes)

    def logits(
        self, folder: Path, documents: Sequence[Sequence[int]], *, dtype: str = "float32"
    ) -> list[npt.NDArray[np.float32]]:
        """Let transformers load a folder: logits ``[tokens, vocabulary]`` of each document."""
        reply = self._call("logits", folder=str(folder), dtype=dtype, documents=[list(each) for each in documents])
        assert reply["missing_keys"] == []
        return [np.array(logits, dtype=np.float32) for logits in reply["logits"]]

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
        arguments = {"max_new_tokens": max_new_tokens, "end_token_id": end_token_id}
        reply = self._call("generate", folder=str(folder), prompts=[list(each) for each in prompts], **arguments)
        results: list[dict[str, Any]] = reply["results"]
        return results

    def tokenize(self, folder: Path, text: str) -> dict[str, Any]:
        """Let transformers load a folder's tokenizer: ``ids`` of a text and ``eos_token``."""
        return self._call("tokenize", folder=str(folder), text=text)

    def _call(self, action: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"action": action} | arguments) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, self._log.read_text()
        result: dict[str, Any] = json.loads(reply)
        return result


def _save(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**arguments["fields"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(getattr(torch, arguments["dtype"]))
    model.config.dtype = arguments["dtype"]
    model.save_pretrained(arguments["folder"], max_shard_size=arguments["max_shard_size"])
    return {}


def _logits(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        arguments["folder"], dtype=arguments["dtype"], attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        logits = [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in arguments["documents"]]
    return {"logits": [each.tolist() for each in logits], "missing_keys": sorted(info["missing_keys"])}


def _generate(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, end = arguments["folder"], arguments["end_token_id"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder) if (Path(folder) / "tokenizer.json").exists() else None
    results = []
    for prompt in arguments["prompts"]:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=arguments["max_new_tokens"],
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )[0].tolist()
        new = ids[len(prompt) :]
        new = new[: new.index(end)] if end in new else new
        results.append({"ids": new, "text": None if tokenizer is None else tokenizer.decode(new)})
    return {"results": results}


def _tokenize(arguments: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments["folder"])
    ids = tokenizer(arguments["text"], add_special_tokens=False)["input_ids"]
    return {"ids": ids, "eos_token": tokenizer.eos_token}


def _main() -> None:
    for module in ("fla", "causal_conv1d"):
        sys.modules[module] = None  # type: ignore[assignment]
    # Replies alone go to the parent; whatever libraries print goes to the log.
    replies, sys.stdout = sys.stdout, sys.stderr
    actions = {"save": _save, "generate": _generate, "logits": _logits, "tokenize": _tokenize}
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(actions[arguments["action"]](arguments)), file=replies, flush=True)


if __name__ == "__main__":
    _main()
