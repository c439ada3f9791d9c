"""Layers, MTP and the whole model on random cuts: packed documents equal separate ones, weight gradients included.

With decays as initialised a leak of the delta rule dies out within a token or two and drowns in rounding; so the model
forgets slowly here (A = 0.05).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.model.mtp import input_ids
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.selftest.case import relative_error
from tests.unit.model.small_models import HYBRID, batch_of, build, scales_of, small_config

TOLERANCE = 1e-5
DEPTHS = 2

Part = Callable[[Qwen3NextForCausalLM, PackedBatch], torch.Tensor]


def delta_net(model: Qwen3NextForCausalLM, batch: PackedBatch) -> torch.Tensor:
    x_TD = model.model.embed_tokens(batch.input_ids_T)
    return model.model.layers[0].linear_attn(x_TD, model._context(batch).sequences)


def attention(model: Qwen3NextForCausalLM, batch: PackedBatch) -> torch.Tensor:
    context = model._context(batch)
    return model.model.layers[1].self_attn(
        model.model.embed_tokens(batch.input_ids_T), context.sequences, context.rotary
    )


def mtp(model: Qwen3NextForCausalLM, batch: PackedBatch) -> torch.Tensor:
    assert model.mtp is not None
    embed = model.model.embed_tokens
    inputs = [embed(batch.input_ids_T)], [embed(input_ids(batch.labels_T))]
    (hidden,), _ = model.mtp(*inputs, 1, [model._context(batch)])
    return hidden


def hidden_states(model: Qwen3NextForCausalLM, batch: PackedBatch) -> torch.Tensor:
    return model.forward_hidden(batch)


PARTS: dict[str, Part] = {
    "delta net": delta_net,
    "attention": attention,
    "mtp": mtp,
    "decoder": hidden_states,
}


@pytest.fixture(scope="module")
def model() -> Qwen3NextForCausalLM:
    # Every expert is chosen: a token between two experts would turn a rounding error into another choice. The balance
    # of the experts is meant to be taken over all documents, so that loss is left out.
    config = small_config(
        num_hidden_layers=4,
        layer_types=HYBRID * 2,
        mtp_num_layers=DEPTHS,
        mtp_loss_scaling_factor=1.0,
        router_aux_loss_coef=0.0,
        num_experts=4,
        num_experts_per_tok=4,
    )
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(math.log(0.05))
            if name.endswith("dt_bias"):
                parameter.fill_(0.0)
    return model


def random_lengths(seed: int) -> list[int]:
    """Two to six documents, one of them a single token and never the first."""
    rng = random.Random(seed)
    lengths = [1, *(rng.choice((1, 2, rng.randint(3, 90))) for _ in range(rng.randint(0, 4)))]
    rng.shuffle(lengths)
    return [rng.randint(2, 90), *lengths]


def alone(packed: PackedBatch) -> list[PackedBatch]:
    """Each document as a batch of its own."""
    bounds = packed.cu_seqlens_cpu.tolist()
    batches = []
    for start, end in pairwise(bounds):
        tokens = np.append(packed.input_ids_T[start:end].numpy(), 0)
        row = PackedRow(tokens, np.array([0, end - start]), False)
        batches.append(PackedBatch.from_rows([row], mtp_depths=DEPTHS))
    return batches


def gradients(model: Qwen3NextForCausalLM, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every weight the scalar depends on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", list(PARTS))
def test_outputs_and_weight_gradients(model: Qwen3NextForCausalLM, part: str, seed: int) -> None:
    packed = batch_of([random_lengths(seed)], seed=seed, mtp_depths=DEPTHS)
    out = PARTS[part](model, packed)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    expected = gradients(model, (out * up).sum())
    assert len(expected) > 5
    total = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    start = 0
    for batch in alone(packed):
        span = slice(start, start + batch.num_tokens)
        value = PARTS[part](model, batch)
        assert relative_error(value.detach(), out[span].detach()) < TOLERANCE
        for name, gradient in gradients(model, (value * up[span]).sum()).items():
            total[name] += gradient
        start = span.stop
    for name, gradient in expected.items():
        assert relative_error(total[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("seed", range(4))
def test_losses_of_every_depth_and_weight_gradients(model: Qwen3NextForCausalLM, seed: int) -> None:
    """Two rows, so that rows are cut too."""
    lengths = random_lengths(seed)
    packed = batch_of([lengths, lengths[::-1]], seed=seed, mtp_depths=DEPTHS)
    scales = scales_of(packed)
    output = model([packed], scales)[0]
    expected = gradients(model, output.total)
    assert len(expected) == len(list(model.parameters()))
    total = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    losses = torch.zeros(1 + DEPTHS)
    for batch in alone(packed):
        part = model([batch], scales)[0]
        losses += torch.cat((part.nll_lm_sum.view(1), part.nll_mtp_sums))
        for name, gradient in gradients(model, part.total).items():
            total[name] += gradient
    assert relative_error(losses, torch.cat((output.nll_lm_sum.view(1), output.nll_mtp_sums))) < TOLERANCE
    for name, gradient in expected.items():
        assert relative_error(total[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("part", list(PARTS))
def test_a_leak_would_be_seen(model: Qwen3NextForCausalLM, part: str) -> None:
    """The same tokens as one document: what follows the cut comes out differently by much."""
    apart, joined = batch_of([[25, 35]], mtp_depths=DEPTHS), batch_of([[60]], mtp_depths=DEPTHS)
    assert torch.equal(apart.input_ids_T, joined.input_ids_T)
    with torch.no_grad():
        separate, together = PARTS[part](model, apart)[25:], PARTS[part](model, joined)[25:]
    assert relative_error(together, separate) > 1e-2
