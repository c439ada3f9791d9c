"""Exact FLOPs against torch's counter on the real model's forward and backward pass, part by part.

The counter sees matrix products. Where the reference kernels work otherwise (element-wise convolution, chunked delta
rule, padded attention, a head that adds in place), kernels take their place here that compute the same by the products
that are counted: the convolution's windows, the recurrence's four products, attention document by document.

Letters: T tokens, N value heads, H key heads, K key head dim, V value head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from qwen3next_train.accounting.flops import TRAINING_PASSES, forward_flops
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.kernels import gdn_prologue
from qwen3next_train.kernels.gdn_prologue import GdnPrologueOutputs, HeadShape
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology
from tests.unit.accounting.shapes import TINY
from tests.unit.model.small_models import CPU, batch_of, cpu_kernels, scales_of, small_config


def spans(sequences: VarlenMetadata) -> list[tuple[int, int]]:
    return list(pairwise(sequences.cu_seqlens_cpu.tolist()))


def counted_convolution(x_TC: torch.Tensor, weight_CW: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    """One product per channel over its windows: of a convolution's backward pass torch's counter ignores the groups."""
    width = weight_CW.shape[1]
    rows = []
    for start, end in spans(sequences):
        windows_CTW = F.pad(x_TC[start:end].T, (width - 1, 0)).unfold(1, width, 1)
        rows.append(torch.bmm(windows_CTW, weight_CW.unsqueeze(2)).squeeze(2).T)
    return F.silu(torch.cat(rows))


def counted_delta_rule(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_TNV: torch.Tensor, *, sequences: VarlenMetadata, **gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token and head: read the key's value, erase it, write, read the query's."""
    ratio = v_TNV.shape[1] // k_THK.shape[1]
    q, k = (x.repeat_interleave(ratio, dim=1) for x in (q_THK, k_THK))
    q = q * q.shape[-1] ** -0.5
    decay, strength = gates["g_TN"].exp(), gates["beta_TN"]
    outputs, finals = [], []
    for start, end in spans(sequences):
        # The state before the first token counts like any other.
        state = torch.zeros(v_TNV.shape[1], k.shape[2], v_TNV.shape[2], requires_grad=True)
        for t in range(start, end):
            state = state * decay[t, :, None, None]
            column, write = k[t].unsqueeze(2), v_TNV[t].unsqueeze(1) * strength[t, :, None, None]
            erase = torch.bmm(column.mT, state) * strength[t, :, None, None]
            state = state - torch.bmm(column, erase) + torch.bmm(column, write)
            outputs.append(torch.bmm(q[t].unsqueeze(1), state).squeeze(1))
        finals.append(state)
    return torch.stack(outputs), torch.stack(finals)


def counted_prologue(*inputs: torch.Tensor, heads: HeadShape, sequences: VarlenMetadata) -> GdnPrologueOutputs:
    """The reference around the convolution that is counted."""
    with mock.patch.object(gdn_prologue, "causal_conv1d_reference", counted_convolution):
        return gdn_prologue.gdn_prologue_reference(*inputs, heads=heads, sequences=sequences)


def counted_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sequences: VarlenMetadata) -> torch.Tensor:
    """Both products over each document's whole square, of which a causal kernel needs half."""
    ratio, rows = q.shape[1] // k.shape[1], []
    for start, end in spans(sequences):
        q_NTH = q[start:end].transpose(0, 1) * q.shape[-1] ** -0.5
        k_NTH, v_NTH = (x[start:end].repeat_interleave(ratio, dim=1).transpose(0, 1) for x in (k, v))
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = torch.bmm(q_NTH, k_NTH.mT).masked_fill(future, float("-inf"))
        rows.append(torch.bmm(scores.softmax(-1), v_NTH).transpose(0, 1))
    return torch.cat(rows)


def counted_head(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, losses_T: torch.Tensor | None
) -> torch.Tensor:
    """The reference adds to its weight gradient in place, which torch's counter does not see."""
    assert losses_T is None
    return F.cross_entropy(F.linear(hidden_TD, weight_VD), labels_T, reduction="sum")


def build(config: ModelConfig, kernels: KernelSet) -> Qwen3NextForCausalLM:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=kernels)
    initialize(model, parameter_table(config), seed=0, topology=Topology(), device=CPU)
    return model


def counted_kernels() -> KernelSet:
    return replace(
        cpu_kernels(),
        gdn_prologue=counted_prologue,
        gated_delta_rule=counted_delta_rule,
        varlen_attention=counted_attention,
        linear_cross_entropy=counted_head,
    )


# Where a part's products happen: the ends of module names; a module that ends with "=" without those below it.
PLACES = {
    "gdn_projections": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
    "gdn_conv": ("conv1d",),
    "gdn_delta_rule": ("linear_attn=",),
    "attention_projections": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention_scores": ("self_attn=",),
    "router": ("mlp.gate",),
    "routed_experts": ("mlp.experts",),
    "shared_expert": ("mlp.shared_expert",),
    "shared_expert_gate": ("mlp.shared_expert_gate",),
    "fc": ("mtp.fc",),
    "head": ("lm_head",),
}


def counted(model: Qwen3NextForCausalLM, counter: FlopCounterMode) -> dict[str, int]:
    """torch's count by our parts; the head's, which one module does for all depths, under ``head``."""
    root = type(model).__name__ + "."
    totals = {
        name.removeprefix(root): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    parts = dict.fromkeys([*PLACES, *(f"mtp_{part}" for part in PLACES)], 0)
    for name, total in totals.items():
        for part, ends in PLACES.items():
            key = f"mtp_{part}" if name.startswith("mtp.") else part
            if name.endswith(tuple(end for end in ends if not end.endswith("="))):
                parts[key] += total
            if f"{name}=".endswith(tuple(end for end in ends if end.endswith("="))):
                below = (count for other, count in totals.items() if other.rpartition(".")[0] == name)
                parts[key] += total - sum(below)
    assert sum(parts.values()) == counter.get_total_flops(), "a product outside every part"
    return parts


CASES: dict[str, tuple[ModelConfig, Sequence[Sequence[int]]]] = {
    "tiny, packed": (TINY, [[7, 3], [1, 9]]),
    "no mtp, whole rows": (small_config(mtp_num_layers=0), [[12], [12]]),
    "two depths, packed": (small_config(mtp_num_layers=2), [[9, 1, 2], [5, 7]]),
    "ungated, no shared expert": (
        small_config(
            attention_output_gate=False, shared_expert_intermediate_size=0, shared_expert_gate=False, mtp_num_layers=1
        ),
        [[10, 6]],
    ),
    "four linear layers, tied, one expert": (
        small_config(
            num_hidden_layers=4,
            layer_types=["linear_attention"] * 4,
            tie_word_embeddings=True,
            num_experts_per_tok=1,
            linear_conv_kernel_dim=3,
            linear_num_value_heads=2,
        ),
        [[4, 4, 4]],
    ),
    "three softmax layers": (
        small_config(
            num_hidden_layers=3, layer_types=["full_attention"] * 3, num_key_value_heads=4, shared_expert_gate=False
        ),
        [[8, 5]],
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_every_part_is_what_torch_counts(case: str) -> None:
    """Equal to the last digit, once the scores are halved; in training everything three times."""
    config, rows = CASES[case]
    model = build(config, counted_kernels())
    batch = batch_of(rows, vocab_size=config.vocab_size, mtp_depths=config.mtp_num_layers)
    ours = forward_flops(config, num_tokens=batch.num_tokens, sum_squared_lengths=batch.sum_squared_lengths)
    expected = {part: count for part, count in ours.items() if count}
    expected["head"] += expected.pop("mtp_head", 0)
    for part in ("attention_scores", "mtp_attention_scores"):
        if part in expected:
            expected[part] *= 2

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model([batch], scales_of(batch))[0]
    parts = counted(model, forward)
    assert {part: count for part, count in parts.items() if count} == expected

    with FlopCounterMode(display=False) as training:
        model([batch], scales_of(batch))[0].total.backward()
    assert training.get_total_flops() == TRAINING_PASSES * sum(expected.values())


@pytest.mark.parametrize("case", list(CASES))
def test_what_was_counted_is_the_model(case: str) -> None:
    """The kernels that were counted compute what the reference kernels compute."""
    config, rows = CASES[case]
    batch = batch_of(rows, vocab_size=config.vocab_size, mtp_depths=config.mtp_num_layers)
    results: list[Any] = [
        build(config, kernels)([batch], scales_of(batch))[0] for kernels in (counted_kernels(), cpu_kernels())
    ]
    torch.testing.assert_close(results[0].nll_lm_sum, results[1].nll_lm_sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0].nll_mtp_sums, results[1].nll_mtp_sums, rtol=1e-5, atol=0)
    assert torch.equal(results[0].expert_counts_LE, results[1].expert_counts_LE)


def test_reference_kernels_do_no_less() -> None:
    """As trained on CPU: the same projections and experts; what the chunked rule does on top is no model work."""
    config, rows = CASES["two depths, packed"]
    model = build(config, cpu_kernels())
    batch = batch_of(rows, mtp_depths=2)
    ours = forward_flops(config, num_tokens=batch.num_tokens, sum_squared_lengths=batch.sum_squared_lengths)
    ours["head"] += ours.pop("mtp_head")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model([batch], scales_of(batch))[0]
    parts = counted(model, counter)
    elsewhere = {"gdn_conv", "gdn_delta_rule", "attention_scores", "mtp_attention_scores"}
    assert {part: parts[part] for part in ours.keys() - elsewhere} == {
        part: ours[part] for part in ours.keys() - elsewhere
    }
    assert parts["gdn_delta_rule"] > ours["gdn_delta_rule"]
