"""Cases of the mixers' operations, their definitions written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels.gated_delta_rule import recurrent_gated_delta_rule
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import EPS, NUM_TOKENS, Case, Outputs, RandomInputs


def delta_rule_tensors(random: RandomInputs, heads: HeadShape, num_tokens: int) -> dict[str, torch.Tensor]:
    """Arguments of the gated delta rule for documents that begin empty."""
    # From strong to slow decay over the heads: a state that is forgotten at once hides its errors.
    rate_N = torch.logspace(0, -3, heads.value_heads, dtype=torch.float64, device=random.device)
    return {
        "q_THK": F.normalize(random.normal(num_tokens, heads.key_heads, heads.key_dim), dim=-1),
        "k_THK": F.normalize(random.normal(num_tokens, heads.key_heads, heads.key_dim), dim=-1),
        "v_TNV": random.normal(num_tokens, heads.value_heads, heads.value_dim),
        "g_TN": -rate_N * random.uniform(num_tokens, heads.value_heads),
        "beta_TN": random.uniform(num_tokens, heads.value_heads),
    }


def projection_tensors(random: RandomInputs, heads: HeadShape, num_tokens: int, width: int) -> dict[str, torch.Tensor]:
    """Arguments of the operation that makes the rule's; ``width`` is the convolution's."""
    return {
        "qkvz_TP": random.normal(num_tokens, heads.key_heads * sum(heads.group_sizes)),
        "ba_TM": random.normal(num_tokens, 2 * heads.value_heads),
        "weight_CW": random.normal(heads.channels, width),
        "A_log_N": random.normal(heads.value_heads),
        "dt_bias_N": random.normal(heads.value_heads),
    }


def first_output(rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], **inputs: torch.Tensor) -> Outputs:
    """The rule's output without its final state, which training does not read."""
    return (rule(**inputs)[0],)


def _few_heads(model: ModelConfig) -> HeadShape:
    """Two key heads of the model's sizes, and at most eight value heads to each."""
    group = min(8, model.linear_num_value_heads // model.linear_num_key_heads)
    return HeadShape(2, 2 * group, model.linear_key_head_dim, model.linear_value_head_dim)


def _gated_delta_rule(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    # FlashQLA is compiled for a number of heads, and for states, by minutes: what training runs is compiled once.
    as_trained = any(
        choice.operation == "gated_delta_rule" and choice.backend == "flash_qla" for choice in kernels.choices
    )
    heads = HeadShape.of(model) if as_trained else _few_heads(model)
    decay = frozenset({"g_TN"})
    fp32_inputs = decay | {"initial_state_DNKV"}
    for sequences in random.packings():
        inputs = delta_rule_tensors(random, heads, NUM_TOKENS)
        kernel = partial(kernels.gated_delta_rule, sequences=sequences)
        reference = partial(recurrent_gated_delta_rule, sequences=sequences)
        if as_trained or sequences.num_documents > 1:
            # As in training: documents begin empty, and nobody reads the final state.
            yield Case(inputs, partial(first_output, kernel), partial(first_output, reference), fp32_inputs, decay)
        else:
            inputs["initial_state_DNKV"] = 0.1 * random.normal(1, heads.value_heads, heads.key_dim, heads.value_dim)
            yield Case(inputs, partial(_with_state, kernel), partial(_with_state, reference), fp32_inputs, decay)


def _with_state(rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], **inputs: torch.Tensor) -> Outputs:
    out, final = rule(**inputs, output_final_state=True)
    assert final is not None
    return out, final


def _gdn_prologue(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    heads = _few_heads(model)
    for sequences in random.packings():
        inputs = projection_tensors(random, heads, NUM_TOKENS, model.linear_conv_kernel_dim)
        kernel = partial(kernels.gdn_prologue, heads=heads, sequences=sequences)
        reference = partial(_plain_gdn_prologue, heads=heads, sequences=sequences)
        yield Case(inputs, kernel, reference, frozenset({"A_log_N", "dt_bias_N"}))


def _varlen_attention(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    kv_heads = min(2, model.num_key_value_heads)
    # A gradient of k or v is a sum over its query heads; many more of them would add up to more than the bound.
    heads = kv_heads * min(8, model.num_attention_heads // model.num_key_value_heads)
    for sequences in random.packings():
        inputs = {
            "q_TNH": random.normal(NUM_TOKENS, heads, model.head_dim),
            "k_TGH": random.normal(NUM_TOKENS, kv_heads, model.head_dim),
            "v_TGH": random.normal(NUM_TOKENS, kv_heads, model.head_dim),
        }
        yield Case(inputs, _single(kernels.varlen_attention, sequences), _single(_plain_attention, sequences))


def _gated_rms_norm(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    size = model.linear_value_head_dim
    inputs = {
        "x": random.normal(NUM_TOKENS, 3, size),
        "gate": random.normal(NUM_TOKENS, 3, size),
        "weight": 1 + random.normal(size) / 4,
    }
    yield Case(inputs, lambda **inputs: (kernels.gated_rms_norm(**inputs, eps=EPS),), _plain_gated_rms_norm)


def _qk_norm_rope(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    rotated = int(model.head_dim * model.partial_rotary_factor)
    angle = (random.uniform(NUM_TOKENS, 1, rotated // 2) * 7).float()
    cos, sin = angle.cos(), angle.sin()
    cos_T1r, sin_T1r = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    # As in the model: the heads are the first halves of a wider projection.
    inputs = {"x_T": random.normal(NUM_TOKENS, 3 * 2 * model.head_dim), "weight_H": random.normal(model.head_dim) / 4}

    def heads(x_T: torch.Tensor) -> torch.Tensor:
        return x_T.unflatten(1, (3, -1))[..., : model.head_dim]

    def kernel(x_T: torch.Tensor, weight_H: torch.Tensor) -> Outputs:
        return (kernels.qk_norm_rope(heads(x_T), weight_H, cos_T1r, sin_T1r, eps=EPS),)

    def reference(x_T: torch.Tensor, weight_H: torch.Tensor) -> Outputs:
        return (_plain_qk_norm_rope(heads(x_T), weight_H, torch.complex(cos.double(), sin.double())),)

    yield Case(inputs, kernel, reference)


def _output_gate(kernels: KernelSet, model: ModelConfig, random: RandomInputs) -> Iterator[Case]:
    shape = (NUM_TOKENS, 3, model.head_dim)
    inputs = {"x_TNH": random.normal(*shape), "gate_TNH": 3 * random.normal(*shape)}

    def reference(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> Outputs:
        return (x_TNH / (1 + (-gate_TNH).exp()),)

    yield Case(inputs, lambda **inputs: (kernels.output_gate(**inputs),), reference)


MIXER_CASES: dict[str, Callable[[KernelSet, ModelConfig, RandomInputs], Iterator[Case]]] = {
    "gated_delta_rule": _gated_delta_rule,
    "gdn_prologue": _gdn_prologue,
    "gated_rms_norm": _gated_rms_norm,
    "varlen_attention": _varlen_attention,
    "qk_norm_rope": _qk_norm_rope,
    "output_gate": _output_gate,
}
"""By field of ``KernelSet``."""


def _single(operation: Callable[..., torch.Tensor], sequences: VarlenMetadata) -> Callable[..., Outputs]:
    return lambda **inputs: (operation(**inputs, sequences=sequences),)


def _spans(sequences: VarlenMetadata) -> list[tuple[int, int]]:
    return list(pairwise(sequences.cu_seqlens_cpu.tolist()))


def _plain_gdn_prologue(
    qkvz_TP: torch.Tensor,
    ba_TM: torch.Tensor,
    weight_CW: torch.Tensor,
    A_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    *,
    heads: HeadShape,
    sequences: VarlenMetadata,
) -> Outputs:
    key_dim, values = heads.key_dim, heads.group * heads.value_dim
    groups = [columns.split((key_dim, key_dim, values, values), -1) for columns in qkvz_TP.chunk(heads.key_heads, -1)]
    q_TC, k_TC, v_TC, _ = (torch.cat(part, -1) for part in zip(*groups, strict=True))
    y_TC = _plain_conv(torch.cat((q_TC, k_TC, v_TC), -1), weight_CW, sequences=sequences)
    q_THK, k_THK = (
        part.unflatten(-1, (heads.key_heads, key_dim)) for part in y_TC[:, : 2 * q_TC.shape[1]].chunk(2, dim=-1)
    )
    small = [columns.chunk(2, -1) for columns in ba_TM.chunk(heads.key_heads, -1)]
    b_TN, a_TN = (torch.cat(part, -1) for part in zip(*small, strict=True))
    return (
        q_THK / (q_THK.square().sum(-1, keepdim=True) + EPS).sqrt(),
        k_THK / (k_THK.square().sum(-1, keepdim=True) + EPS).sqrt(),
        y_TC[:, 2 * q_TC.shape[1] :].unflatten(-1, (heads.value_heads, heads.value_dim)),
        torch.stack([group[3] for group in groups], 1).unflatten(-1, (heads.group, heads.value_dim)),
        -A_log_N.exp() * (a_TN + dt_bias_N).exp().log1p(),
        1 / (1 + (-b_TN).exp()),
    )


def _plain_attention(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, *, sequences: VarlenMetadata
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


def _plain_gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> Outputs:
    return (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * gate * gate.sigmoid(),)


def _plain_conv(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    rows, columns = x_TC.unbind(0), weight_CW.unbind(1)
    outputs = []
    for start, end in _spans(sequences):
        for t in range(start, end):
            seen = rows[max(start, t + 1 - len(columns)) : t + 1]
            terms = [row * column for row, column in zip(reversed(seen), reversed(columns), strict=False)]
            outputs.append(F.silu(torch.stack(terms).sum(0)))
    return torch.stack(outputs)


def _plain_qk_norm_rope(x_TNH: torch.Tensor, weight_H: torch.Tensor, turn_T1X: torch.Tensor) -> torch.Tensor:
    normed = x_TNH / (x_TNH.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight_H)
    half = turn_T1X.shape[-1]
    turned = torch.complex(normed[..., :half], normed[..., half : 2 * half]) * turn_T1X
    return torch.cat((turned.real, turned.imag, normed[..., 2 * half :]), dim=-1)
