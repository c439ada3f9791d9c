"""Each operation's selected backend against its definition, written out in fp64: outputs and every gradient.

A wrong kernel trains without a complaint and to a worse model: Triton 3.4 to 3.7.0 on Hopper gave the gated delta
rule wrong gradients of k (flash-linear-attention issue 640). Inputs are small, but have the head sizes of the model
that will be trained, documents whose lengths fit no tile, and decays slow enough for states to reach far.

Letters: those of the operations' packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule
from qwen3next_train.kernels.linear_cross_entropy import IGNORE_INDEX
from qwen3next_train.kernels.selection import KernelChoice, KernelSet
from qwen3next_train.kernels.sequences import Sequences
from qwen3next_train.train.checks import Check, attempt

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error (norm of the difference over the norm of the truth) of an output or a gradient."""

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}

_LENGTHS = (65, 1, 64, 62)
_NUM_TOKENS = sum(_LENGTHS)
_EPS = 1e-6

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Trial:
    """One operation on one set of inputs.

    Args:
        inputs: fp64, on the device; each gets a gradient.
        kernel: the backend, called with the inputs by name.
        truth: the definition, called likewise.
        wide: inputs that the model keeps in fp32 when activations are narrower.
    """

    inputs: Mapping[str, torch.Tensor]
    kernel: Callable[..., Outputs]
    truth: Callable[..., Outputs]
    wide: frozenset[str] = frozenset()


def kernel_checks(kernels: KernelSet, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """One check per operation.

    Args:
        kernels: selected backends.
        model: whose head sizes are used.
        device: where the model will live.
        dtype: of weights and activations.
    """

    def check_of(choice: KernelChoice) -> list[Check]:
        return attempt(f"kernel {choice.operation}", lambda: [_kernel_check(choice, kernels, model, device, dtype)])

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
        dtype: of the inputs; the truth gets the same rounded values.

    Returns:
        ``output``, ``output 2`` for a second one, and ``grad NAME`` for each input; infinite where not finite.
    """
    worst: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for trial in _TRIALS[operation](kernels, model, _Random(generator, device)):
        for name, error in _errors(trial, dtype).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth (over 1 where that is 0); infinite if not finite."""
    norm = float(torch.linalg.vector_norm(truth.double()))
    difference = float(torch.linalg.vector_norm(value.double() - truth.double()))
    error = difference / norm if norm > 0 else difference
    return error if error < float("inf") else float("inf")


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
        remedy = f"set kernels.{choice.operation} to reference"
        if choice.backend == "reference":
            remedy = "do not train with this build of torch on this machine, and report it"
        detail = f"{detail}: wrong results; {remedy}"
    return Check(f"kernel {choice.operation}", ok, detail)


def _errors(trial: Trial, dtype: torch.dtype) -> dict[str, float]:
    narrow, exact = {}, {}
    for name, value in trial.inputs.items():
        rounded = value.to(torch.promote_types(dtype, torch.float32) if name in trial.wide else dtype)
        narrow[name] = rounded.clone().requires_grad_()
        exact[name] = rounded.to(torch.float64, copy=True).requires_grad_()
    outputs = trial.kernel(**narrow)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output.device, output.dtype)
        for output in outputs
    ]
    torch.autograd.backward(outputs, upstream)
    with _one_thread():
        truths = trial.truth(**exact)
        torch.autograd.backward(truths, [gradient.double() for gradient in upstream])
    errors = {}
    for index, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        errors["output" if index == 0 else f"output {index + 1}"] = relative_error(output.detach(), truth.detach())
    for name, leaf in narrow.items():
        gradient, true_gradient = leaf.grad, exact[name].grad
        assert gradient is not None, name
        assert true_gradient is not None, name
        errors[f"grad {name}"] = relative_error(gradient, true_gradient)
    return errors


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of tiny operations, whose threads would spend their time waiting for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class _Random:
    """fp64 values drawn on the host, so that every device gets the same."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self.generator).to(self.device)

    def packings(self) -> Iterator[Sequences]:
        """Documents of odd lengths, then one document."""
        for lengths in (_LENGTHS, (_NUM_TOKENS,)):
            yield Sequences.from_lengths(lengths, self.device)


def _gated_delta_rule(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    key_dim, value_dim, key_heads = model.linear_key_head_dim, model.linear_value_head_dim, 2
    value_heads = key_heads * min(8, model.linear_num_value_heads // model.linear_num_key_heads)
    # From strong to slow decay over the heads: a state that is forgotten at once hides its errors.
    rate_N = torch.logspace(0, -3, value_heads, dtype=torch.float64, device=random.device)
    wide = frozenset({"g_TN", "initial_state_DNKV"})
    for sequences in random.packings():
        inputs = {
            "q_THK": random.normal(_NUM_TOKENS, key_heads, key_dim),
            "k_THK": random.normal(_NUM_TOKENS, key_heads, key_dim),
            "v_TNV": random.normal(_NUM_TOKENS, value_heads, value_dim),
            "g_TN": -rate_N * random.uniform(_NUM_TOKENS, value_heads),
            "beta_TN": random.uniform(_NUM_TOKENS, value_heads),
        }
        kernel = partial(kernels.gated_delta_rule, sequences=sequences)
        truth = partial(recurrent_gated_delta_rule, sequences=sequences)
        if sequences.num_documents > 1:
            # As in training: documents begin empty, and nobody reads the final state.
            yield Trial(inputs, partial(_first, kernel), partial(_first, truth), wide)
        else:
            inputs["initial_state_DNKV"] = 0.1 * random.normal(1, value_heads, key_dim, value_dim)
            yield Trial(inputs, kernel, truth, wide)


def _first(rule: Callable[..., Outputs], **inputs: torch.Tensor) -> Outputs:
    return rule(**inputs)[:1]


def _causal_conv1d(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    channels = 96
    for sequences in random.packings():
        inputs = {
            "x_TC": random.normal(_NUM_TOKENS, channels),
            "weight_CW": random.normal(channels, model.linear_conv_kernel_dim),
        }
        yield Trial(inputs, _single(kernels.causal_conv1d, sequences), _single(_plain_conv, sequences))


def _varlen_attention(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    kv_heads = min(2, model.num_key_value_heads)
    # A gradient of k or v is a sum over its query heads; many more of them would add up to more than the bound.
    heads = kv_heads * min(8, model.num_attention_heads // model.num_key_value_heads)
    for sequences in random.packings():
        inputs = {
            "q_TNH": random.normal(_NUM_TOKENS, heads, model.head_dim),
            "k_TGH": random.normal(_NUM_TOKENS, kv_heads, model.head_dim),
            "v_TGH": random.normal(_NUM_TOKENS, kv_heads, model.head_dim),
        }
        yield Trial(inputs, _single(kernels.varlen_attention, sequences), _single(_plain_attention, sequences))


def _grouped_matmul(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    hidden, expert_hidden = _capped(model.hidden_size), _capped(model.moe_intermediate_size)
    for counts in ((5, 0, 41, 1), (16, 16, 16, 16)):
        counts_e = torch.tensor(counts, device=random.device)
        inputs = {
            "x_RI": random.normal(sum(counts), hidden),
            "weight_eOI": random.normal(len(counts), expert_hidden, hidden) * hidden**-0.5,
        }

        def kernel(counts_e: torch.Tensor = counts_e, **inputs: torch.Tensor) -> Outputs:
            return (kernels.grouped_matmul(**inputs, counts_e=counts_e),)

        yield Trial(inputs, kernel, partial(_plain_grouped_matmul, counts=counts))


def _capped(size: int) -> int:
    """A size of matrices that is quick to multiply and as aligned as ``size``."""
    return size if size <= 1024 else 1024 + size % 128


def _gated_rms_norm(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    size = model.linear_value_head_dim
    inputs = {
        "x": random.normal(_NUM_TOKENS, 3, size),
        "gate": random.normal(_NUM_TOKENS, 3, size),
        "weight": 1 + random.normal(size) / 4,
    }
    yield Trial(inputs, lambda **inputs: (kernels.gated_rms_norm(**inputs, eps=_EPS),), _plain_gated_rms_norm)


def _linear_cross_entropy(kernels: KernelSet, model: ModelConfig, random: _Random) -> Iterator[Trial]:
    # Large enough for the reference to need several chunks on CPU.
    hidden, vocabulary = 16, 32768
    inputs = {"hidden_TD": random.normal(_NUM_TOKENS, hidden), "weight_VD": random.normal(vocabulary, hidden)}
    labels_T = (random.uniform(_NUM_TOKENS) * vocabulary).long()
    labels_T[::5] = IGNORE_INDEX

    def kernel(**inputs: torch.Tensor) -> Outputs:
        return (kernels.linear_cross_entropy(**inputs, labels_T=labels_T),)

    def truth(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Outputs:
        return (F.cross_entropy(hidden_TD @ weight_VD.t(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum"),)

    yield Trial(inputs, kernel, truth)


_TRIALS: dict[str, Callable[[KernelSet, ModelConfig, _Random], Iterator[Trial]]] = {
    "gated_delta_rule": _gated_delta_rule,
    "causal_conv1d": _causal_conv1d,
    "varlen_attention": _varlen_attention,
    "grouped_matmul": _grouped_matmul,
    "gated_rms_norm": _gated_rms_norm,
    "linear_cross_entropy": _linear_cross_entropy,
}


def _single(operation: Callable[..., torch.Tensor], sequences: Sequences) -> Callable[..., Outputs]:
    return lambda **inputs: (operation(**inputs, sequences=sequences),)


def _spans(sequences: Sequences) -> list[tuple[int, int]]:
    return list(pairwise(sequences.cu_seqlens_cpu.tolist()))


def _plain_conv(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: Sequences) -> torch.Tensor:
    rows, columns = x_TC.unbind(0), weight_CW.unbind(1)
    outputs = []
    for start, end in _spans(sequences):
        for t in range(start, end):
            seen = rows[max(start, t + 1 - len(columns)) : t + 1]
            terms = [row * column for row, column in zip(reversed(seen), reversed(columns), strict=False)]
            outputs.append(F.silu(torch.stack(terms).sum(0)))
    return torch.stack(outputs)


def _plain_attention(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, *, sequences: Sequences
) -> torch.Tensor:
    group = q_TNH.shape[1] // k_TGH.shape[1]
    outputs = []
    for start, end in _spans(sequences):
        q_NTH = q_TNH[start:end].transpose(0, 1)
        k_NTH, v_NTH = (x[start:end].transpose(0, 1).repeat_interleave(group, dim=0) for x in (k_TGH, v_TGH))
        scores_NTT = q_NTH @ k_NTH.mT * q_TNH.shape[-1] ** -0.5
        future_TT = torch.ones(end - start, end - start, dtype=torch.bool, device=q_TNH.device).triu(1)
        weights_NTT = scores_NTT.masked_fill(future_TT, float("-inf")).softmax(-1)
        outputs.append((weights_NTT @ v_NTH).transpose(0, 1))
    return torch.cat(outputs)


def _plain_grouped_matmul(x_RI: torch.Tensor, weight_eOI: torch.Tensor, *, counts: tuple[int, ...]) -> Outputs:
    experts = torch.repeat_interleave(torch.tensor(counts)).tolist()
    weights = weight_eOI.unbind(0)
    return (torch.stack([weights[expert] @ row for expert, row in zip(experts, x_RI.unbind(0), strict=True)]),)


def _plain_gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Outputs:
    return (x / (x.square().mean(-1, keepdim=True) + _EPS).sqrt() * weight * gate * gate.sigmoid(),)
