"""Each operation's selected backend against its definition, written out in fp64: outputs and every gradient.

A wrong kernel trains without a complaint and to a worse model: Triton 3.4 to 3.7.0 on Hopper gave the gated delta
rule wrong gradients of k (flash-linear-attention issue 640). Inputs are small, but have the head sizes of the model
that will be trained, documents whose lengths fit no tile, and decays slow enough for states to reach far.

Letters: those of the operations' packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.choices import KernelChoice
from qwen3next_train.kernels.gates import MAX_CONSUMERS
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest import dense_cases, mixer_cases, moe_cases
from qwen3next_train.selftest.case import Case, RandomInputs, case_errors
from qwen3next_train.selftest.check import Check, try_check

LENGTHS = (65, 1, 64, 62)
NUM_TOKENS = sum(LENGTHS)

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error (norm of the difference over the norm of the reference) of an output or a gradient."""

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


def kernel_checks(kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """One check per operation.

    Args:
        kernels: selected backends.
        model: whose head sizes are used.
        device: where the model will live.
        dtype: of weights and activations.
    """

    def check_of(choice: KernelChoice) -> list[Check]:
        return try_check(f"kernel {choice.operation}", lambda: [_kernel_check(choice, kernels, model, device, dtype)])

    return [check for choice in kernels.choices for check in check_of(choice)]


def kernel_errors(
    operation: str, kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Relative error of every output and gradient of an operation, the largest over packed and dense inputs.

    Args:
        operation: field of ``KernelSet``.
        kernels: selected backends.
        model: whose head sizes are used.
        device: where to run.
        dtype: of the inputs; the reference gets the same rounded values.

    Returns:
        ``output``, ``output 2`` for a second one, and ``grad NAME`` for each input; infinite where not finite.
    """
    worst: dict[str, float] = {}
    random = RandomInputs(torch.Generator().manual_seed(0), device)
    for case in _small_cases(operation, kernels, model, random):
        for name, error in case_errors(case, kernels, dtype).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _kernel_check(
    choice: KernelChoice, kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Check:
    # A reference also takes fp64, where nothing but a mistake can make a difference.
    dtypes = (dtype, torch.float64) if choice.backend == "reference" else (dtype,)
    ok, parts = True, []
    for precision in dtypes:
        errors = kernel_errors(choice.operation, kernels, model, device, precision)
        name, error = max(errors.items(), key=lambda item: item[1])
        ok = ok and error <= BOUNDS[precision]
        parts.append(f"{DTYPE_NAMES[precision]} {error:.1e} ({name}), allowed {BOUNDS[precision]:.0e}")
    detail = f"{choice.backend} ({choice.reason}); largest error: {'; '.join(parts)}"
    if not ok:
        hint = f"set kernels.{choice.key} to reference"
        if choice.backend == "reference":
            hint = "do not train with this build of torch on this machine, and report it"
        detail = f"{detail}: wrong results; {hint}"
    return Check(f"kernel {choice.operation}", ok, detail)


def _small_cases(operation: str, kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    """An operation with head sizes of the model, and whatever else its kernels are compiled for."""
    # FlashQLA is compiled for a number of heads, and for states, by minutes: what training runs is compiled once.
    compiled_once = any(
        choice.operation == "gated_delta_rule" and choice.backend == "flash_qla" for choice in kernels.choices
    )
    if operation == "gated_delta_rule" and compiled_once:
        return _gated_delta_rule_as_trained(model, random)
    return _CASES[operation](model, random)


def _packings(device: torch.device) -> Iterator[VarlenMetadata]:
    """Documents of odd lengths, then one document."""
    for lengths in (LENGTHS, (NUM_TOKENS,)):
        yield VarlenMetadata.from_lengths(lengths, device)


def _capped(size: int, limit: int = 1024) -> int:
    """A size of matrices that is quick to multiply and as aligned as ``size``."""
    return size if size <= limit else limit + size % 128


def _few_heads(model: ModelConfig) -> HeadShape:
    """Two key heads of the model's sizes, and at most eight value heads to each."""
    group = min(8, model.linear_num_value_heads // model.linear_num_key_heads)
    return HeadShape(2, 2 * group, model.linear_key_head_dim, model.linear_value_head_dim)


def _gated_delta_rule(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for sequences in _packings(random.device):
        one = sequences.num_documents == 1
        yield mixer_cases.gated_delta_rule(random, _few_heads(model), sequences, with_states=one)


def _gated_delta_rule_as_trained(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for sequences in _packings(random.device):
        yield mixer_cases.gated_delta_rule(random, HeadShape.of(model), sequences)


def _delta_rule_summary(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for sequences in _packings(random.device):
        yield mixer_cases.delta_rule_summary(random, _few_heads(model), sequences)


def _delta_state_gradient(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for sequences in _packings(random.device):
        yield mixer_cases.delta_state_gradient(random, _few_heads(model), sequences)


def _gdn_prologue(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for sequences in _packings(random.device):
        yield mixer_cases.gdn_prologue(random, _few_heads(model), sequences, model.linear_conv_kernel_dim)


def _varlen_attention(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    kv_heads = min(2, model.num_key_value_heads)
    # A gradient of k or v is a sum over its query heads; many more of them would add up to more than the bound.
    heads = kv_heads * min(8, model.num_attention_heads // model.num_key_value_heads)
    for sequences in _packings(random.device):
        yield mixer_cases.varlen_attention(random, heads, kv_heads, model.head_dim, sequences)


def _gated_rms_norm(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    yield mixer_cases.gated_rms_norm(random, (NUM_TOKENS, 3, model.linear_value_head_dim))


def _qk_norm_rope(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    rotated, columns = int(model.head_dim * model.partial_rotary_factor), 2 * model.head_dim
    yield mixer_cases.qk_norm_rope(random, NUM_TOKENS, 3, model.head_dim, rotated=rotated, columns=columns)


def _output_gate(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    yield mixer_cases.output_gate(random, NUM_TOKENS, 3, model.head_dim)


def _grouped_matmul(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    # Of the last three the first has several tiles of rows and of columns, one of them full to the last row; the second
    # more tiles than a device has multiprocessors; the third more rows than a kernel sums up at a time.
    for counts, limit in (
        ((5, 0, 41, 1), 1024),
        ((16, 16, 16, 16), 1024),
        ((300, 128, 0, 7, 700), 512),
        ((260, 18000, 128), 64),
        ((2100, 7), 256),
    ):
        hidden, expert_hidden = _capped(model.hidden_size, limit), _capped(model.moe_intermediate_size, limit)
        yield moe_cases.grouped_matmul(random, counts, hidden, expert_hidden)
    # Room for more rows than there are, in a tile that is begun and in tiles behind it.
    yield moe_cases.grouped_matmul(
        random, (300, 0, 41), _capped(model.hidden_size), _capped(model.moe_intermediate_size), unused_rows=200
    )


def _top_k_routing(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    yield moe_cases.top_k_routing(
        random,
        NUM_TOKENS,
        _capped(model.hidden_size),
        model.num_experts,
        top_k=model.num_experts_per_tok,
        renormalize=model.norm_topk_prob,
        num_rows=2,
    )


def _token_permutation(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    num_experts = 5
    ids_TK = moe_cases.random_experts(random, NUM_TOKENS, num_experts, top_k=3)
    # Some pairs have no row, as with experts of other ranks.
    ids_TK = ids_TK.where(ids_TK != num_experts - 1, -1)
    yield moe_cases.permute(random, ids_TK, num_experts, _capped(model.hidden_size), back=True)


def _swiglu(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    case = moe_cases.swiglu(random, NUM_TOKENS, _capped(model.moe_intermediate_size), weighted=True)
    yield case
    yield replace(case, inputs={"gate_up": case.inputs["gate_up"]})


def _shared_expert_combine(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    yield moe_cases.shared_expert_combine(random, NUM_TOKENS, _capped(model.hidden_size))


def _shared_input(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    for count in range(2, MAX_CONSUMERS + 1):
        yield moe_cases.shared_input(random, NUM_TOKENS, _capped(model.hidden_size), count)


def _rms_norm(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    size = _capped(model.hidden_size)
    case = dense_cases.rms_norm(random, NUM_TOKENS, size, "normalize", "fused_add_rms_norm")
    yield case
    inputs = {name: case.inputs[name] for name in ("x_TD", "weight_D")}
    yield replace(dense_cases.rms_norm(random, NUM_TOKENS, size, "rms_norm_with_residual"), inputs=inputs)


def _linear_cross_entropy(model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    # Large enough for the reference to need several chunks on CPU.
    yield dense_cases.linear_cross_entropy(random, NUM_TOKENS, vocabulary=32768, hidden=16, logit_std=4)


_CASES: dict[str, Callable[[ModelConfig, RandomInputs], Iterator[Case]]] = {
    "gated_delta_rule": _gated_delta_rule,
    "delta_rule_summary": _delta_rule_summary,
    "delta_state_gradient": _delta_state_gradient,
    "gdn_prologue": _gdn_prologue,
    "gated_rms_norm": _gated_rms_norm,
    "varlen_attention": _varlen_attention,
    "qk_norm_rope": _qk_norm_rope,
    "output_gate": _output_gate,
    "grouped_matmul": _grouped_matmul,
    "top_k_routing": _top_k_routing,
    "token_permutation": _token_permutation,
    "swiglu": _swiglu,
    "shared_expert_combine": _shared_expert_combine,
    "shared_input": _shared_input,
    "rms_norm": _rms_norm,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""By field of ``KernelSet``."""
