"""Random configurations for the comparison with transformers, from a fixed seed.

Each list below is walked in shuffled order, so that every entry occurs in some configuration; what is left is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEED = 0
NUM_CASES = 15

_LENGTHS = (1, 63, 64, 65, 1000, 2, 31, 97, 130, 200, 5, 257, 64, 33, 128)
_PATTERNS = ("one full", "alternate", "every 4th", "all full", "all linear")
_HEAD_RATIOS = (1, 2, 4)
_TOP_K = (1, 2, 3, 4)
_ROTARY = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ParityCase:
    """One comparison.

    Args:
        changes: fields of the model section that differ from ``small_config``; MTP is left out.
        num_rows: sequences, each one document.
        length: tokens of each.
        seed: of weights and tokens.
        pattern: layer pattern in words.
    """

    changes: dict[str, Any]
    num_rows: int = 2
    length: int = 70
    seed: int = 0
    pattern: str = "alternate"


def random_cases() -> list[ParityCase]:
    """The configurations of the parity table; together they hold every entry of the lists above."""
    rng = random.Random(SEED)
    walks = [_walk(rng, values) for values in (_LENGTHS, _PATTERNS, _HEAD_RATIOS, _TOP_K, _ROTARY, (True, False))]
    ties = _walk(rng, (True, False))
    cases = []
    for index in range(NUM_CASES):
        length, pattern, ratio, top_k, rotary, renormalize = (next(walk) for walk in walks)
        layers = _layers(pattern, rng)
        key_dim, value_dim = rng.sample((16, 24, 32, 40), 2)
        key_heads, kv_heads = rng.choice((2, 3, 4)), rng.choice((1, 2))
        changes = {
            "vocab_size": rng.choice((37, 61, 97)),
            "hidden_size": rng.choice((32, 48, 64)),
            "num_hidden_layers": len(layers),
            "layer_types": layers,
            "num_attention_heads": kv_heads * rng.choice((1, 2, 3)),
            "num_key_value_heads": kv_heads,
            "head_dim": rng.choice((8, 16, 24)),
            "partial_rotary_factor": rotary,
            "rope_theta": rng.choice((1e4, 1e6, 1e7)),
            "rms_norm_eps": rng.choice((1e-6, 1e-5)),
            "initializer_range": 0.05,
            "linear_conv_kernel_dim": rng.choice((2, 3, 4, 5)),
            "linear_key_head_dim": key_dim,
            "linear_value_head_dim": value_dim,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": key_heads * ratio,
            "num_experts": rng.choice((4, 6, 8)),
            "num_experts_per_tok": top_k,
            "norm_topk_prob": renormalize,
            "moe_intermediate_size": rng.choice((8, 16, 20)),
            "shared_expert_intermediate_size": rng.choice((8, 24)),
            "tie_word_embeddings": next(ties),
        }
        rows = 1 if length > 500 else 8 if length < 10 else rng.choice((2, 3, 4))
        cases.append(ParityCase(changes, num_rows=rows, length=length, seed=index, pattern=pattern))
    return cases


def _walk(rng: random.Random, values: tuple[Any, ...]) -> Iterator[Any]:
    """All values in a random order, then again in another."""
    while True:
        yield from rng.sample(values, len(values))


def _layers(pattern: str, rng: random.Random) -> list[str]:
    linear, full = "linear_attention", "full_attention"
    if pattern == "one full":
        layers = [linear] * 4
        layers[rng.randrange(4)] = full
        return layers
    return {
        "alternate": [linear, full] * 2,
        "every 4th": [linear, linear, linear, full] * 2,
        "all full": [full] * 3,
        "all linear": [linear] * 3,
    }[pattern]
