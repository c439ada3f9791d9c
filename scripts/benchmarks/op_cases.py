"""What the benchmark of single operations times: each operation's case, and the least a device has to do for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest import dense_cases, mixer_cases, moe_cases
from qwen3next_train.selftest.case import Case, RandomInputs

BF16_BYTES = 2
FP32_BYTES = 4
INT64_BYTES = 8
DENSE_ROWS = (4096,) * 4
PACKED_ROWS = (1000, 3, 2000, 1093) * 4
"""As many tokens, in documents that fit no tile."""


@dataclass(frozen=True)
class Work:
    """What one pass cannot do without.

    Args:
        num_bytes: read and written once, if everything is read and written once.
        flops: of matrix products.
    """

    num_bytes: int
    flops: int = 0


@dataclass(frozen=True)
class OpCase:
    """One operation at one shape.

    Args:
        name: of the operation and of what is special about the shape.
        build: makes the case; bf16 but for what the model keeps in fp32.
        forward: least work of the forward pass.
        backward: least work of the backward pass.
    """

    name: str
    build: Callable[[RandomInputs], Case]
    forward: Work
    backward: Work


def op_cases(
    model: ModelConfig, dense: tuple[int, ...] = DENSE_ROWS, packed: tuple[int, ...] = PACKED_ROWS
) -> Iterator[OpCase]:
    """All cases.

    Args:
        model: whose sizes are used.
        dense: tokens of each row of the micro-batch, every row one document.
        packed: lengths of shorter documents, as many tokens together.
    """
    yield from _moe(model, sum(dense), len(dense))
    yield from _delta_net(model, {"dense rows": dense, "packed rows": packed})
    yield from _dense(model, {"dense rows": dense, "packed rows": packed})


def _moe(model: ModelConfig, tokens: int, num_rows: int) -> Iterator[OpCase]:
    """Of a mixture of experts, every expert with the same number of routed rows in the grouped GEMM."""
    hidden, experts, top_k, ffn = (
        model.hidden_size,
        model.num_experts,
        model.num_experts_per_tok,
        model.moe_intermediate_size,
    )
    rows = tokens * top_k
    stream, copies = BF16_BYTES * tokens * hidden, BF16_BYTES * (tokens + rows) * hidden
    weights, order = FP32_BYTES * rows, INT64_BYTES * rows

    # The products count once, however often they are done.
    flops, num_bytes = 2 * tokens * hidden * experts, stream + FP32_BYTES * experts * hidden
    yield OpCase(
        "routing",
        lambda random: moe_cases.top_k_routing(
            random, tokens, hidden, experts, top_k=top_k, renormalize=model.norm_topk_prob, num_rows=num_rows
        ),
        Work(num_bytes + weights + order, flops),
        Work(2 * num_bytes + weights + order, 2 * flops),
    )
    yield OpCase(
        "sort and permute",
        lambda random: moe_cases.permute(
            random, moe_cases.random_experts(random, tokens, experts, top_k), experts, hidden
        ),
        Work(copies + 2 * weights + 3 * order),
        Work(copies + 2 * weights + order),
    )
    flops = 2 * rows * hidden * 2 * ffn
    num_bytes = BF16_BYTES * (rows * (hidden + 2 * ffn) + experts * hidden * 2 * ffn)
    yield OpCase(
        "grouped matmul, gate and up",
        lambda random: moe_cases.grouped_matmul(random, (rows // experts,) * experts, hidden, 2 * ffn),
        Work(num_bytes, flops),
        Work(2 * num_bytes, 2 * flops),
    )
    product = BF16_BYTES * rows * ffn
    yield OpCase(
        "SwiGLU",
        lambda random: moe_cases.swiglu(random, rows, ffn, weighted=True),
        Work(3 * product + weights),
        Work(5 * product + 2 * weights),
    )
    yield OpCase(
        "unpermute",
        lambda random: moe_cases.unpermute(
            random, moe_cases.random_experts(random, tokens, experts, top_k), experts, hidden
        ),
        Work(copies + order),
        Work(copies + order),
    )
    # The sum's gradient is passed on as it is.
    yield OpCase(
        "gated addition",
        lambda random: moe_cases.shared_expert_combine(random, tokens, hidden),
        Work(5 * stream),
        Work(5 * stream),
    )
    # Nothing happens in the forward pass.
    yield OpCase(
        "fan out to four",
        lambda random: moe_cases.shared_input(random, tokens, hidden, 4),
        Work(0),
        Work(5 * stream),
    )


def _delta_net(model: ModelConfig, packings: dict[str, tuple[int, ...]]) -> Iterator[OpCase]:
    """Of the Gated DeltaNet mixer; the rule's FLOPs are those of the products of the chunked form."""
    heads, chunk = HeadShape.of(model), 64
    tokens = sum(packings["dense rows"])
    columns = heads.key_heads * sum(heads.group_sizes)
    k, v, rows = heads.key_dim, heads.value_dim, tokens * heads.value_heads
    convolved, z = BF16_BYTES * tokens * heads.channels, BF16_BYTES * tokens * (columns - heads.channels)
    gates, out = rows * (3 * BF16_BYTES + FP32_BYTES), BF16_BYTES * rows * v
    for name, lengths in packings.items():
        yield OpCase(
            f"delta rule inputs, {name}",
            lambda random, lengths=lengths: mixer_cases.gdn_prologue(
                random, heads, VarlenMetadata.from_lengths(lengths, random.device), model.linear_conv_kernel_dim
            ),
            Work(2 * convolved + gates),
            Work(3 * convolved + 2 * z + 2 * gates),
        )
    operands = convolved + rows * (FP32_BYTES + BF16_BYTES)
    for name, lengths in packings.items():
        yield OpCase(
            f"gated delta rule, {name}",
            lambda random, lengths=lengths: mixer_cases.gated_delta_rule(
                random, heads, VarlenMetadata.from_lengths(lengths, random.device)
            ),
            Work(operands + out, rows * (6 * k * v + 2 * chunk * (3 * k + 2 * v))),
            Work(2 * operands + out, rows * (16 * k * v + 2 * chunk * (10 * k + 5 * v))),
        )
    slice_of_row = (tokens,)
    yield OpCase(
        "summary of a slice",
        lambda random: mixer_cases.delta_rule_summary(
            random, heads, VarlenMetadata.from_lengths(slice_of_row, random.device)
        ),
        Work(operands, rows * (4 * k * (k + v) + 2 * chunk * (2 * k + v))),
        Work(0),
    )
    yield OpCase(
        "state gradient of a slice",
        lambda random: mixer_cases.delta_state_gradient(
            random, heads, VarlenMetadata.from_lengths(slice_of_row, random.device)
        ),
        Work(operands, rows * (4 * k * v + 2 * chunk * (3 * k + v))),
        Work(0),
    )
    yield OpCase(
        "gated RMSNorm",
        lambda random: mixer_cases.gated_rms_norm(
            random, (tokens, heads.key_heads, heads.group, v), columns=sum(heads.group_sizes)
        ),
        Work(3 * out),
        Work(5 * out),
    )


def _dense(model: ModelConfig, packings: dict[str, tuple[int, ...]]) -> Iterator[OpCase]:
    """Norms, attention and loss."""
    tokens, hidden, vocabulary = sum(packings["dense rows"]), model.hidden_size, model.vocab_size
    heads, kv_heads, head_dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    stream, q, kv = (BF16_BYTES * tokens * size for size in (hidden, heads * head_dim, kv_heads * head_dim))
    for name, method, forward, backward in (
        ("RMSNorm", "normalize", 2, 3),
        # Its backward adds the gradient of the residual stream.
        ("stream + RMSNorm", "rms_norm_with_residual", 2, 4),
        ("sum + RMSNorm", "fused_add_rms_norm", 4, 4),
    ):
        yield OpCase(
            name,
            lambda random, method=method: dense_cases.rms_norm(random, tokens, hidden, method),
            Work(forward * stream),
            Work(backward * stream),
        )
    rotated = int(head_dim * model.partial_rotary_factor)
    # The backward pass also spreads the query's gradient over the columns of its projection, which holds the gate too.
    for name, num, columns, size, spread in (
        ("query norm + rotary", heads, 2 * head_dim, q, 4 * q),
        ("key norm + rotary", kv_heads, head_dim, kv, 0),
    ):
        yield OpCase(
            name,
            lambda random, num=num, columns=columns: mixer_cases.qk_norm_rope(
                random, tokens, num, head_dim, rotated=rotated, columns=columns
            ),
            Work(2 * size),
            Work(3 * size + spread),
        )
    yield OpCase(
        "output gate", lambda random: mixer_cases.output_gate(random, tokens, heads, head_dim), Work(3 * q), Work(5 * q)
    )
    for name, lengths in packings.items():
        # Half of each document's square is visible; two products forward, five backward (scores again).
        product = sum(length**2 for length in lengths) * heads * head_dim
        yield OpCase(
            f"attention, {name}",
            lambda random, lengths=lengths: mixer_cases.varlen_attention(
                random, heads, kv_heads, head_dim, VarlenMetadata.from_lengths(lengths, random.device)
            ),
            Work(2 * q + 2 * kv, 2 * product),
            Work(4 * q + 4 * kv, 5 * product),
        )
    weight, logits = BF16_BYTES * vocabulary * hidden, BF16_BYTES * tokens * vocabulary
    flops = 2 * tokens * vocabulary * hidden
    # Logits are written and read once; then their gradient takes their place, which both products read. The gradients
    # count as backward, though the forward pass of training computes them.
    yield OpCase(
        "linear + cross entropy",
        lambda random: dense_cases.linear_cross_entropy(random, tokens, vocabulary, hidden, ignore_every=tokens),
        Work(2 * logits + weight + stream, flops),
        Work(3 * logits + 4 * (weight + stream), 2 * flops),
    )
