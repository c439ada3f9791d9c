import torch
from torch import nn

from qwen3next_train.config.schema import ModelConfig, OptimizerConfig
from qwen3next_train.optim.param_groups import parameter_groups, takes_weight_decay
from qwen3next_train.parameters import ParamSpec, parameter_table

MODEL = ModelConfig(
    vocab_size=11,
    hidden_size=4,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=2,
    linear_value_head_dim=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    partial_rotary_factor=0.5,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=3,
    shared_expert_intermediate_size=3,
)

MOE = [
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
]
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
QK_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
LAYER_NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]

DECAYED = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    "mtp.fc.weight",
    *(f"model.layers.0.linear_attn.{name}.weight" for name in ("conv1d", "in_proj_qkvz", "in_proj_ba", "out_proj")),
    *(f"model.layers.0.{name}" for name in MOE),
    *(f"{layer}.{name}" for layer in ("model.layers.1", "mtp.layers.0") for name in (*ATTENTION, *QK_NORMS, *MOE)),
}
NOT_DECAYED = {
    *(f"model.layers.0.linear_attn.{name}" for name in ("A_log", "dt_bias", "norm.weight")),
    *(f"{layer}.{name}" for layer in ("model.layers.0", "model.layers.1", "mtp.layers.0") for name in LAYER_NORMS),
    "model.norm.weight",
    "mtp.norm.weight",
    "mtp.pre_fc_norm_embedding.weight",
    "mtp.pre_fc_norm_hidden.weight",
}


class _Holder(nn.Module):
    """A module that claims the table's parameter names."""

    def __init__(self, table: tuple[ParamSpec, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.tensors = {
            spec.name: nn.Parameter(torch.empty(spec.shape, dtype=torch.float32 if spec.fp32 else dtype))
            for spec in table
        }

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def, override]
        return iter(self.tensors.items())


def test_every_parameter_is_decayed_or_not_as_megatron_does_for_qwen3_next() -> None:
    table = parameter_table(MODEL)
    decayed = {spec.name for spec in table if takes_weight_decay(spec, apply_wd_to_qk_layernorm=True)}
    assert decayed == DECAYED
    assert {spec.name for spec in table} - decayed == NOT_DECAYED


def test_without_the_flag_the_qk_norms_are_not_decayed() -> None:
    table = parameter_table(MODEL)
    decayed = {spec.name for spec in table if takes_weight_decay(spec, apply_wd_to_qk_layernorm=False)}
    qk_norms = {f"{layer}.{name}" for layer in ("model.layers.1", "mtp.layers.0") for name in QK_NORMS}
    assert DECAYED - decayed == qk_norms


def test_groups_partition_the_parameters_and_have_one_dtype_each_lower_precision_first() -> None:
    table = parameter_table(MODEL)
    holder = _Holder(table, torch.bfloat16)
    groups = parameter_groups(holder, table, OptimizerConfig(weight_decay=0.1))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in holder.tensors.values())
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decay_bfloat16", 0.1),
        ("no_decay_bfloat16", 0.0),
        ("decay_float32", 0.1),
        ("no_decay_float32", 0.0),
    ]
    assert all(len({parameter.dtype for parameter in group["params"]}) == 1 for group in groups)


def test_an_fp32_model_has_two_groups() -> None:
    table = parameter_table(MODEL)
    groups = parameter_groups(_Holder(table, torch.float32), table, OptimizerConfig())
    assert [group["name"] for group in groups] == ["decay_float32", "no_decay_float32"]
