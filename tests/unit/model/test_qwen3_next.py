"""The whole model: parameter table, losses, causality, precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch, PackedRow
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.model.qwen3_next import LossScales, ModelOutput, Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.selftest.case import relative_error
from tests.unit.model.small_models import batch_of, build, cpu_kernels, scales_of, small_config

SHAPES = {
    "default": small_config(),
    "no shared expert": small_config(shared_expert_intermediate_size=0),
    "ungated shared expert": small_config(shared_expert_gate=False),
    "no output gate": small_config(attention_output_gate=False),
    "tied": small_config(tie_word_embeddings=True),
    "no mtp": small_config(mtp_num_layers=0),
    "two mtp depths": small_config(mtp_num_layers=2),
    "80B": ModelConfig(layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 12),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_names_and_shapes_equal_the_parameter_table(shape: str) -> None:
    config = SHAPES[shape]
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=cpu_kernels())
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert built == {spec.name: spec.shape for spec in parameter_table(config)}
    assert not list(model.buffers())


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "80B"])
def test_every_parameter_gets_a_gradient(shape: str) -> None:
    config = SHAPES[shape]
    model = build(config)
    batch = batch_of([[20, 13], [33]], mtp_depths=config.mtp_num_layers)
    model([batch], scales_of(batch))[0].total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_local_experts_shrink_only_the_stacked_tensors() -> None:
    config = small_config()
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=cpu_kernels(), local_experts=range(2, 4))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for spec in parameter_table(config):
        assert built[spec.name] == ((2, *spec.shape[1:]) if spec.expert else spec.shape)


def test_total_is_the_sum_of_its_parts_each_by_its_own_divisor() -> None:
    config = small_config(
        mtp_num_layers=2, mtp_loss_scaling_factor=0.3, router_aux_loss_coef=0.05, router_z_loss_coef=0.01
    )
    model = build(config)
    batch = batch_of([[20, 13]], mtp_depths=2)
    output = model([batch], LossScales((100.0, torch.tensor(90.0), 80), num_micro_batches=4))[0]
    expected = (
        output.nll_lm_sum / 100
        + 0.15 * (output.nll_mtp_sums[0] / 90 + output.nll_mtp_sums[1] / 80)
        + (0.05 * output.aux_L.sum() + 0.01 * output.z_L.sum()) / 4
    )
    torch.testing.assert_close(output.total.detach(), expected, rtol=1e-6, atol=0)
    assert output.expert_counts_LE.shape == (4, config.num_experts)
    assert output.expert_counts_LE.sum(1).tolist() == [33 * 2] * 4
    assert output.z_L.shape == output.router_entropy_L.shape == (4,)


def test_next_token_loss_equals_cross_entropy_of_the_logits() -> None:
    model = build(small_config())
    batch = batch_of([[20, 13]])
    logits = model.forward_logits(batch)
    expected = F.cross_entropy(logits, batch.labels_T, reduction="sum")
    torch.testing.assert_close(model([batch], scales_of(batch))[0].nll_lm_sum, expected)
    torch.testing.assert_close(model.next_token_nll(batch), expected)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    config = small_config(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    rows = [[20, 13], [33], [1, 2, 30], [16, 17]]
    model = build(config)
    whole = batch_of(rows)
    model([whole], scales_of(whole))[0].total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    tokens = np.concatenate([whole.input_ids_T.numpy(), [0]])
    for index, lengths in enumerate(rows):
        row = PackedRow(tokens[33 * index : 33 * index + 34], np.cumsum([0, *lengths]), False)
        part = PackedBatch.from_rows([row], mtp_depths=1)
        model([part], LossScales(whole.num_targets, num_micro_batches=4))[0].total.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-5, name


def _run(model: Qwen3NextForCausalLM, batch: PackedBatch, scales: LossScales) -> tuple[ModelOutput, dict]:
    model.zero_grad()
    output = model([batch], scales)[0]
    output.total.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_tokens_after_do_not_change_tokens_before() -> None:
    model = build(small_config())
    batch = batch_of([[50]])
    changed_ids = batch.input_ids_T.clone()
    changed_ids[30:] = (changed_ids[30:] + 1) % 61
    before, after = model.forward_logits(batch), model.forward_logits(replace(batch, input_ids_T=changed_ids))
    torch.testing.assert_close(before[:30], after[:30], rtol=0, atol=1e-5)
    assert (before[30:] - after[30:]).abs().max() > 1e-2


def test_a_batch_without_any_target_has_a_finite_loss() -> None:
    config = small_config(router_aux_loss_coef=0.0)
    model = build(config)
    batch = batch_of([[1, 1, 1]])
    assert (batch.labels_T == IGNORE_INDEX).all()
    output, gradients = _run(model, batch, scales_of(batch))
    assert output.total.item() == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_bf16_keeps_the_tables_fp32_parameters() -> None:
    config = small_config()
    marked = {spec.name for spec in parameter_table(config) if spec.fp32}
    assert len(marked) == 2 + 3
    for model in (build(config, dtype=torch.bfloat16), build(config)):
        model.cast_(torch.bfloat16)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in marked else torch.bfloat16), name


def test_bf16_is_close_to_fp32_and_trains() -> None:
    config = small_config(initializer_range=0.05)
    batch = batch_of([[40, 24]])
    expected = build(config)([batch], scales_of(batch))[0]
    model = build(config, dtype=torch.bfloat16)
    output = model([batch], scales_of(batch))[0]
    output.total.backward()
    assert output.total.dtype == torch.float32
    assert abs(float(output.total.detach()) / float(expected.total.detach()) - 1) < 2e-2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all(), name


def test_cast_works_before_the_parameters_exist() -> None:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(small_config(), kernels=cpu_kernels())
    model.cast_(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.is_meta


def test_repeats_are_bit_equal() -> None:
    batch = batch_of([[40, 24], [64]])
    first = _run(build(small_config()), batch, scales_of(batch))
    second = _run(build(small_config()), batch, scales_of(batch))
    assert torch.equal(first[0].total, second[0].total)
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_tied_head_is_the_embedding() -> None:
    model = build(small_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_thirty_steps_learn_a_repeated_batch() -> None:
    model = build(small_config(initializer_range=0.05))
    batch = batch_of([[40, 24]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        model.begin_step()
        output = model([batch], scales_of(batch))[0]
        output.total.backward()
        optimizer.step()
        losses.append(float(output.nll_lm_sum) / batch.num_targets[0])
    assert abs(losses[0] - np.log(61)) < 0.5
    assert losses[-1] < 1.5
