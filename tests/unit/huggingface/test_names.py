"""Names and offsets of Hugging Face tensors."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.huggingface.names import in_memory, mtp_layer, num_mtp_layers, on_disk
from qwen3next_train.parameters import parameter_table
from tests.unit.huggingface.support import tiny_model

PUBLISHED_MTP = {
    "mtp.fc.weight",
    "mtp.norm.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
    "mtp.layers.0.input_layernorm.weight",
    "mtp.layers.0.post_attention_layernorm.weight",
    *(f"mtp.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    "mtp.layers.0.mlp.gate.weight",
    "mtp.layers.0.mlp.shared_expert_gate.weight",
    *(f"mtp.layers.0.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")),
}
"""As the index of Qwen3-Next-80B-A3B and vLLM's qwen3_next_mtp have them, routed experts aside."""


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_tensors_on_disk_tile_every_parameter(depths: int) -> None:
    for spec in parameter_table(tiny_model(mtp_num_layers=depths)):
        tensors = on_disk(spec)
        assert [tensor.start for tensor in tensors] == [0, *(tensor.stop for tensor in tensors[:-1])]
        assert tensors[-1].stop == spec.numel
        assert {tensor.parameter for tensor in tensors} == {spec.name}


def test_an_expert_is_gate_above_up_and_a_down_projection() -> None:
    """Against the stacking that transformers does when it loads: cat([gate, up]) of every expert."""
    experts = {spec.name: spec for spec in parameter_table(tiny_model()) if spec.expert}
    stacked = torch.arange(3 * 10 * 8).view(3, 10, 8)
    for tensor in on_disk(experts["model.layers.0.mlp.experts.gate_up_proj"]):
        expert, part = int(tensor.name.split(".")[5]), tensor.name.split(".")[6]
        rows = slice(0, 5) if part == "gate_proj" else slice(5, 10)
        piece = stacked.flatten()[tensor.start : tensor.stop].view(tensor.shape)
        assert torch.equal(piece, stacked[expert, rows])
    down = on_disk(experts["mtp.layers.0.mlp.experts.down_proj"])
    assert [(tensor.name, tensor.shape, tensor.start) for tensor in down] == [
        (f"mtp.layers.0.mlp.experts.{expert}.down_proj.weight", (8, 5), 40 * expert) for expert in range(3)
    ]


def test_the_published_80b_model() -> None:
    table = parameter_table(with_layer_types(ModelConfig()))
    tensors = [tensor for spec in table for tensor in on_disk(spec)]
    names = {tensor.name for tensor in tensors}
    assert len(names) == len(tensors)
    assert sum(tensor.numel for tensor in tensors) == 81_324_862_720
    mtp = {name for name in names if name.startswith("mtp.")}
    assert {name for name in mtp if ".experts." not in name} == PUBLISHED_MTP
    assert len(mtp) == len(PUBLISHED_MTP) + 3 * 512
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in names)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.47.mlp.experts.511.up_proj.weight"} <= names


def test_no_head_on_disk_when_tied() -> None:
    names = {tensor.name for spec in parameter_table(tiny_model(tie_word_embeddings=True)) for tensor in on_disk(spec)}
    assert "lm_head.weight" not in names


def test_in_memory_is_the_parameter_itself() -> None:
    for spec in parameter_table(tiny_model()):
        whole = in_memory(spec)
        assert (whole.name, whole.shape, whole.start, whole.stop) == (spec.name, spec.shape, 0, spec.numel)


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        ([], 0),
        (["model.layers.7.x"], 0),
        (["mtp.layers.0.x", "mtp.layers.0.y", "mtp.norm.weight"], 1),
        (["mtp.layers.0.x", "mtp.layers.1.x"], 2),
        (["mtp.norm.weight"], 1),
        (["mtp.layers.999999999999.x"], 1),
    ],
)
def test_depths_held(names: list[str], depths: int) -> None:
    assert num_mtp_layers(names) == depths


def test_mtp_layer() -> None:
    assert mtp_layer("mtp.layers.12.mlp.gate.weight") == 12
    assert mtp_layer("mtp.layers.012.mlp.gate.weight") is None
    assert mtp_layer("mtp.fc.weight") is None
    assert mtp_layer("model.mtp.layers.1.x") is None
