"""config.json both ways."""

import json

import pytest

from qwen3next_train.config.huggingface import MTP_KEY, model_config_from_hf, model_config_to_hf
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import PRESETS, shipped_folder
from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.errors import ConfigError

# As published with Qwen3-Next-80B-A3B-Instruct.
PUBLISHED = json.loads("""
{"architectures": ["Qwen3NextForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
 "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
 "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
 "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
 "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
 "norm_topk_prob": true, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
 "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": false, "partial_rotary_factor": 0.25,
 "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000000, "router_aux_loss_coef": 0.001,
 "shared_expert_intermediate_size": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
 "transformers_version": "4.57.0.dev0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}
""")
# What config.json has no place for; the rest survives a round trip.
TRAINING_ONLY = {"router_aux_loss_scope", "router_z_loss_coef", "mtp_loss_scaling_factor"}


def refusal(data, origin="config.json", **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        model_config_from_hf(data, origin, **kwargs)
    return str(caught.value)


def test_published_file_is_the_schemas_default():
    assert model_config_from_hf(PUBLISHED, "config.json", mtp_num_layers=1) == with_layer_types(ModelConfig())
    assert model_config_from_hf(PUBLISHED, "config.json").mtp_num_layers == 0


def test_rope_parameters_of_transformers_5():
    data = {**PUBLISHED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}}
    del data["rope_theta"], data["partial_rotary_factor"]
    model = model_config_from_hf(data, "config.json")
    assert (model.rope_theta, model.partial_rotary_factor) == (5e6, 0.5)


def test_absent_keys_have_transformers_defaults():
    model = model_config_from_hf({"model_type": "qwen3_next"}, "config.json")
    assert (model.rope_theta, model.max_position_embeddings, model.head_dim) == (1e4, 32768, 256)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    model = load_config([shipped_folder() / f"qwen3next_{name}.yaml"]).config.model
    back = model_config_from_hf(json.loads(json.dumps(model_config_to_hf(model))), "config.json")
    assert back.model_dump(exclude=TRAINING_ONLY) == model.model_dump(exclude=TRAINING_ONLY)


def test_only_keys_that_hugging_face_knows_are_exported():
    """``mtp_num_hidden_layers`` is that of Qwen's newer models, the other two those of transformers 5."""
    known = PUBLISHED.keys() | {"layer_types", "rope_parameters", "mtp_num_hidden_layers"}
    model = with_layer_types(ModelConfig(linear_dt_init="log_uniform", router_z_loss_coef=1.0))
    assert model_config_to_hf(model).keys() - known == set()


def test_irregular_pattern_round_trip():
    model = load_config([], [("linear-attention-freq", "[1]*46+[0]*2")]).config.model
    assert model_config_from_hf(model_config_to_hf(model), "c").layer_types == model.layer_types


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "qwen3_moe"}, "model_type: not qwen3_next (got 'qwen3_moe'); name a Qwen3-Next checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported (got 'gelu'); give 'silu' or leave the key out"),
        (
            {"attention_bias": True},
            "attention_bias: only false is supported (got true); give false or leave the key out",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout: only 0 is supported (got 0.1); give 0 or leave the key out"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: only 1 is supported (got 2); give 1 or leave the key out"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers: only [] is supported (got [0]); give [] or leave the key out"),
        (
            {"rope_scaling": {"type": "yarn"}},
            "rope_scaling: only null is supported (got {'type': 'yarn'}); give null or leave the key out",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters: rope_type is not supported (got 'yarn'); give rope_type default, rope_theta and "
            "partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"factor": 4}},
            "rope_parameters: factor is not supported (got 4); give rope_type default, rope_theta and "
            "partial_rotary_factor",
        ),
        (
            {"rope_parameters": 4},
            "rope_parameters: not a mapping (got 4); give rope_type default, rope_theta and partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"rope_theta": 500000.0}},
            "rope_parameters: rope_theta 500000.0 contradicts 10000000 given as rope_theta; keep one",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor 0.5 contradicts 0.25 given as partial_rotary_factor; keep one",
        ),
        ({"hidden_size": "big"}, "hidden_size: not a whole number (got 'big'); give a whole number > 0"),
        (
            {"layer_types": ["mamba"] + ["linear_attention"] * 47},
            "layer_types.0: not one of the choices (got 'mamba'); give one of linear_attention, full_attention",
        ),
        (
            {"layer_types": ["linear_attention"]},
            "model.layer_types: model.layer_types has 1 entries for model.num_hidden_layers 48; give one per layer, or "
            "model.full_attention_interval instead",
        ),
        (
            {"num_key_value_heads": 3},
            "model.num_attention_heads: model.num_attention_heads 16 is not a multiple of model.num_key_value_heads 3; "
            "change one of them",
        ),
    ],
)
def test_another_model_is_refused(change, line):
    assert refusal({**PUBLISHED, **change}) == f"config.json: {line}"


def test_depths_count_under_their_name_there_only():
    data = {**PUBLISHED, MTP_KEY: 2, "mtp_num_layers": 7}
    assert model_config_from_hf(data, "config.json").mtp_num_layers == 2


def test_model_type_is_required():
    assert "model_type" in refusal({})


def test_what_transformers_cannot_express_is_not_exported():
    model = with_layer_types(ModelConfig())
    for change in ({"attention_output_gate": False}, {"shared_expert_gate": False}):
        with pytest.raises(ConfigError, match="cannot be exported"):
            model_config_to_hf(model.model_copy(update=change))


def test_its_constants_are_tolerated_in_the_model_section(tmp_path):
    path = tmp_path / "c.yaml"
    keys = {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "partial_rotary_factor")}
    keys |= {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}, "mtp_num_hidden_layers": 1}
    path.write_text(json.dumps({"model": keys}))
    assert load_config([path]).config.model == with_layer_types(ModelConfig())
    path.write_text("model: {hidden_act: gelu, rope_theta: 1.0, rope_parameters: {rope_theta: 2.0}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(caught.value).splitlines() == [
        f"{path}: model.hidden_act: only 'silu' is supported (got 'gelu'); give 'silu' or leave the key out",
        f"{path}: model.rope_parameters (model.rope_theta): 2.0 contradicts 1.0 given as model.rope_theta; both set "
        "model.rope_theta, keep one",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_is_exported(name):
    transformers = pytest.importorskip("transformers")
    model = load_config([shipped_folder() / f"qwen3next_{name}.yaml"]).config.model
    read = transformers.Qwen3NextConfig(**model_config_to_hf(model)).to_dict()
    assert read["rope_parameters"]["rope_theta"] == model.rope_theta
    assert read["rope_parameters"]["partial_rotary_factor"] == model.partial_rotary_factor
    ours = model.model_dump()
    for key in ours.keys() & read.keys():
        assert read[key] == ours[key], key
    assert model_config_from_hf(json.loads(json.dumps(read)), "c").layer_types == model.layer_types
