"""Rules of a layout over processes that need the configuration alone, and which sizes would keep them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen3next_train.config.rule_violation import RuleViolation
from qwen3next_train.config.schema import Config, ModelConfig


def tensor_violations(config: Config) -> Iterator[RuleViolation]:
    """Why the heads of the mixers cannot be divided by so many ranks."""
    model, size = config.model, config.parallel.tensor_parallel_size
    key, row = "parallel.tensor_parallel_size", config.data.sequence_length
    hint = _choose(other for other in range(2, model.num_attention_heads + 1) if tensor_fits(model, row, other))
    counts = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.linear_num_key_heads": model.linear_num_key_heads,
    }
    uneven = [heads for heads, count in counts.items() if count % size]
    if uneven:
        heads = uneven[0]
        yield RuleViolation(
            (key, heads), f"{key} {size} does not divide {heads} {counts[heads]}, which its ranks share; {hint}"
        )
    elif not _repeats(model.num_key_value_heads, size):
        heads = "model.num_key_value_heads"
        yield RuleViolation(
            (key, heads),
            f"{key} {size} neither divides {heads} {model.num_key_value_heads} nor is a multiple of it; {hint}",
        )
    elif row % size:
        yield RuleViolation(
            (key, "data.sequence_length"),
            f"{key} {size} does not divide data.sequence_length {row} into equal shares; {hint}, or make rows of "
            f"{-(-row // size) * size} tokens",
        )


def tensor_fits(model: ModelConfig, row: int, size: int) -> bool:
    """Whether ``size`` ranks can divide the mixers' heads and share rows of ``row`` tokens."""
    divided = (model.num_attention_heads, model.linear_num_key_heads, row)
    return all(count % size == 0 for count in divided) and _repeats(model.num_key_value_heads, size)


def _choose(fitting: Iterable[int]) -> str:
    sizes = ", ".join(map(str, fitting))
    return f"choose {sizes} or 1" if sizes else "set it to 1"


def context_violations(config: Config) -> Iterator[RuleViolation]:
    """Why the tokens of a row cannot be shared by so many ranks."""
    model, size, tensor = config.model, config.parallel.context_parallel_size, config.parallel.tensor_parallel_size
    key, row = "parallel.context_parallel_size", config.data.sequence_length
    if size == 1 or not tensor_fits(model, row, tensor):
        # Which is said already.
        return
    heads, kv_heads, halo = model.num_attention_heads, model.num_key_value_heads, model.linear_conv_kernel_dim - 1
    hint = _choose(other for other in range(2, heads + 1) if context_fits(model, row, other, tensor=tensor))
    divided = f" / parallel.tensor_parallel_size {tensor}" if tensor > 1 else ""
    longer = -(-max(row, size * halo) // (size * tensor)) * size * tensor
    if heads // tensor % size:
        yield RuleViolation(
            (key, "model.num_attention_heads"),
            f"{key} {size} does not divide model.num_attention_heads {heads}{divided}, which its ranks share in "
            f"attention; {hint}",
        )
    elif not _repeats(max(1, kv_heads // tensor), size):
        yield RuleViolation(
            (key, "model.num_key_value_heads"),
            f"{key} {size} neither divides model.num_key_value_heads {kv_heads}{divided} nor is a multiple of it; "
            f"{hint}",
        )
    elif row % (size * tensor):
        times = f" x parallel.tensor_parallel_size {tensor}" if tensor > 1 else ""
        yield RuleViolation(
            (key, "data.sequence_length"),
            f"{key} {size}{times} does not divide data.sequence_length {row} into equal slices; {hint}, or make rows "
            f"of {longer} tokens",
        )
    elif row // size < halo:
        yield RuleViolation(
            (key, "data.sequence_length", "model.linear_conv_kernel_dim"),
            f"{key} {size} cuts data.sequence_length {row} into slices of {row // size}, shorter than the {halo} "
            f"tokens that model.linear_conv_kernel_dim {halo + 1} looks back; {hint}, or make rows of {longer} tokens",
        )


def context_fits(model: ModelConfig, row: int, size: int, *, tensor: int = 1) -> bool:
    """Whether ``size`` ranks, or groups of ``tensor`` ranks that divide the mixers' heads, can share such rows.

    Args:
        model: shape of the model.
        row: tokens of a row.
        size: slices.
        tensor: ranks of a group, which fit by themselves.
    """
    if size == 1:
        return True
    heads, kv_heads = model.num_attention_heads // tensor, max(1, model.num_key_value_heads // tensor)
    shares_heads = heads % size == 0 and _repeats(kv_heads, size)
    return shares_heads and row % (size * tensor) == 0 and row // size >= model.linear_conv_kernel_dim - 1


def _repeats(one: int, other: int) -> bool:
    """Whether one of the two divides the other."""
    return max(one, other) % min(one, other) == 0


def bf16_gradient_violations(config: Config) -> Iterator[RuleViolation]:
    """Only gradient buckets can be of bf16, and fp32 runs have nothing to gain."""
    for key, value, needed in (
        ("run.precision", config.run.precision, ["bf16"]),
        ("parallel.zero_stage", config.parallel.zero_stage, [1, 2]),
        ("parallel.offload_optimizer", config.parallel.offload_optimizer, ["none"]),
    ):
        if value not in needed:
            yield RuleViolation(
                ("parallel.gradient_dtype", key),
                f"parallel.gradient_dtype bf16 does not go with {key} {value}; set {key} to "
                f"{' or '.join(map(str, needed))}, or parallel.gradient_dtype to fp32",
            )
