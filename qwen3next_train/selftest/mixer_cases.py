"""Cases of the mixers' operations, their definitions written out.

Letters: those of the operations' modules.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from qwen3next_train.kernels.gated_delta_rule import (
    GatedDeltaRule,
    recurrent_gated_delta_rule,
    state_gradient_by,
    summary_by,
)
from qwen3next_train.kernels.gdn_prologue import HeadShape
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.case import EPS, Case, Outputs, RandomInputs


def gated_delta_rule(
    random: RandomInputs, heads: HeadShape, sequences: VarlenMetadata, *, with_states: bool = False
) -> Case:
    """As in training, where documents begin empty and nobody reads their final states; or with states at both ends."""
    num_tokens = sequences.num_tokens
    # From strong to slow decay over the heads: a state that is forgotten at once hides its errors.
    rate_N = torch.logspace(0, -3, heads.value_heads, dtype=torch.float64, device=random.device)
    inputs = {
        "q_THK": F.normalize(random.normal(num_tokens, heads.key_heads, heads.key_dim), dim=-1),
        "k_THK": F.normalize(random.normal(num_tokens, heads.key_heads, heads.key_dim), dim=-1),
        "v_TNV": random.normal(num_tokens, heads.value_heads, heads.value_dim),
        "g_TN": -rate_N * random.uniform(num_tokens, heads.value_heads),
        "beta_TN": random.uniform(num_tokens, heads.value_heads),
    }
    if with_states:
        states = sequences.num_documents, heads.value_heads, heads.key_dim, heads.value_dim
        inputs["initial_state_DNKV"] = 0.1 * random.normal(*states)

    def outputs(rule: GatedDeltaRule, **inputs: torch.Tensor) -> Outputs:
        if not with_states:
            return (rule(**inputs, sequences=sequences)[0],)
        out, final = rule(**inputs, sequences=sequences, output_final_state=True)
        assert final is not None
        return out, final

    return Case(
        inputs,
        lambda kernels, **inputs: outputs(kernels.gated_delta_rule, **inputs),
        partial(outputs, recurrent_gated_delta_rule),
        frozenset({"g_TN", "initial_state_DNKV"}),
        frozenset({"g_TN"}),
    )


def delta_rule_summary(random: RandomInputs, heads: HeadShape, sequences: VarlenMetadata) -> Case:
    """What each document does to the state."""
    inputs = dict(gated_delta_rule(random, heads, sequences).inputs)
    del inputs["q_THK"]
    # Slower than in the case of the rule: of a longer document nothing but zeros would be compared.
    inputs["g_TN"] = inputs["g_TN"] / 8

    def run(kernels: KernelSet, **inputs: torch.Tensor) -> Outputs:
        return (kernels.delta_rule_summary(**inputs, sequences=sequences),)

    def definition(**inputs: torch.Tensor) -> Outputs:
        return (summary_by(recurrent_gated_delta_rule)(**inputs, sequences=sequences),)

    return Case(inputs, run, definition, frozenset({"g_TN"}), differentiable=False)


def delta_state_gradient(random: RandomInputs, heads: HeadShape, sequences: VarlenMetadata) -> Case:
    """What a document's outputs say of the state that it begins with."""
    inputs = dict(delta_rule_summary(random, heads, sequences).inputs)
    queries = F.normalize(random.normal(*inputs["k_THK"].shape), dim=-1)
    inputs = {"q_THK": queries, "grad_TNV": inputs.pop("v_TNV"), **inputs}

    def run(kernels: KernelSet, **inputs: torch.Tensor) -> Outputs:
        return (kernels.delta_state_gradient(**inputs, sequences=sequences),)

    def definition(**inputs: torch.Tensor) -> Outputs:
        return (state_gradient_by(recurrent_gated_delta_rule)(**inputs, sequences=sequences),)

    return Case(inputs, run, definition, frozenset({"g_TN"}), differentiable=False)


def gdn_prologue(random: RandomInputs, heads: HeadShape, sequences: VarlenMetadata, width: int) -> Case:
    """What makes the delta rule's operands; ``width`` is the convolution's."""
    inputs = {
        "qkvz_TP": random.normal(sequences.num_tokens, heads.key_heads * sum(heads.group_sizes)),
        "ba_TM": random.normal(sequences.num_tokens, 2 * heads.value_heads),
        "weight_CW": random.normal(heads.channels, width),
        "A_log_N": random.normal(heads.value_heads),
        "dt_bias_N": random.normal(heads.value_heads),
    }

    def run(kernels: KernelSet, **inputs: torch.Tensor) -> Outputs:
        return kernels.gdn_prologue(**inputs, heads=heads, sequences=sequences)

    definition = partial(_plain_gdn_prologue, heads=heads, sequences=sequences)
    return Case(inputs, run, definition, frozenset({"A_log_N", "dt_bias_N"}))


def varlen_attention(
    random: RandomInputs, num_heads: int, num_kv_heads: int, head_dim: int, sequences: VarlenMetadata
) -> Case:
    """Causal attention within each document."""
    inputs = {
        "q_TNH": random.normal(sequences.num_tokens, num_heads, head_dim),
        "k_TGH": random.normal(sequences.num_tokens, num_kv_heads, head_dim),
        "v_TGH": random.normal(sequences.num_tokens, num_kv_heads, head_dim),
    }

    def run(kernels: KernelSet, **inputs: torch.Tensor) -> Outputs:
        return (kernels.varlen_attention(**inputs, sequences=sequences),)

    return Case(inputs, run, partial(_plain_attention, sequences=sequences))


def gated_rms_norm(
    random: RandomInputs, shape: tuple[int, ...], *, columns: int | None = None, eps: float = EPS
) -> Case:
    """The norm of ``shape``, heads by value head dim; weights are all ones but for a quarter.

    With ``columns`` the gate lies where the layer's projection has it, at the end of so many columns of a key head:
    ``shape`` is then tokens, key heads, value heads to each, value head dim.
    """
    inputs = {"x": random.normal(*shape)}
    if columns is None:
        inputs["gate"] = random.normal(*shape)
    else:
        inputs["projection"] = random.normal(*shape[:2], columns)
    inputs["weight"] = 1 + random.normal(shape[-1]) / 4

    def run(kernels: KernelSet, x: torch.Tensor, weight: torch.Tensor, **gate: torch.Tensor) -> Outputs:
        return (kernels.gated_rms_norm(x=x, gate=gate_of(**gate), weight=weight, eps=eps),)

    def definition(x: torch.Tensor, weight: torch.Tensor, **gates: torch.Tensor) -> Outputs:
        gate = gate_of(**gates)
        return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * gate * gate.sigmoid(),)

    def gate_of(gate: torch.Tensor | None = None, projection: torch.Tensor | None = None) -> torch.Tensor:
        if projection is None:
            assert gate is not None
            return gate
        return projection[..., -shape[-2] * shape[-1] :].unflatten(-1, shape[-2:])

    return Case(inputs, run, definition)


def qk_norm_rope(
    random: RandomInputs, num_tokens: int, num_heads: int, head_dim: int, *, rotated: int, columns: int
) -> Case:
    """As in the model: each head is the beginning of so many ``columns`` of a projection."""
    angle = (random.uniform(num_tokens, 1, rotated // 2) * 7).float()
    cos, sin = angle.cos(), angle.sin()
    cos_T1r, sin_T1r = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    inputs = {"x_T": random.normal(num_tokens, num_heads * columns), "weight_H": random.normal(head_dim) / 4}

    def heads(x_T: torch.Tensor) -> torch.Tensor:
        return x_T.unflatten(1, (num_heads, -1))[..., :head_dim]

    def run(kernels: KernelSet, x_T: torch.Tensor, weight_H: torch.Tensor) -> Outputs:
        return (kernels.qk_norm_rope(heads(x_T), weight_H, cos_T1r, sin_T1r, eps=EPS),)

    def definition(x_T: torch.Tensor, weight_H: torch.Tensor) -> Outputs:
        return (_plain_qk_norm_rope(heads(x_T), weight_H, torch.complex(cos.double(), sin.double())),)

    return Case(inputs, run, definition)


def output_gate(random: RandomInputs, num_tokens: int, num_heads: int, head_dim: int) -> Case:
    """The gate of the attention's output."""
    shape = num_tokens, num_heads, head_dim

    def definition(x_TNH: torch.Tensor, gate_TNH: torch.Tensor) -> Outputs:
        return (x_TNH / (1 + (-gate_TNH).exp()),)

    inputs = {"x_TNH": random.normal(*shape), "gate_TNH": 3 * random.normal(*shape)}
    return Case(inputs, lambda kernels, **inputs: (kernels.output_gate(**inputs),), definition)


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
) -> Outputs:
    group = q_TNH.shape[1] // k_TGH.shape[1]
    outputs = []
    for start, end in _spans(sequences):
        q_NTH = q_TNH[start:end].transpose(0, 1)
        k_NTH, v_NTH = (x[start:end].transpose(0, 1).repeat_interleave(group, dim=0) for x in (k_TGH, v_TGH))
        scores_NTT = q_NTH @ k_NTH.mT * q_TNH.shape[-1] ** -0.5
        future_TT = torch.ones(end - start, end - start, dtype=torch.bool, device=q_TNH.device).triu(1)
        weights_NTT = scores_NTT.masked_fill(future_TT, float("-inf")).softmax(-1)
        outputs.append((weights_NTT @ v_NTH).transpose(0, 1))
    return (torch.cat(outputs),)


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
