"""``config.json`` of Qwen3-Next, both ways, without importing transformers.

Most names are the schema's own. What Hugging Face can say and this program fixes is checked; what does not
touch training (token ids, caches, the width of dense layers the model does not have) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qwen3next_train.config.describe import hint_at
from qwen3next_train.config.error_lines import Converted, RejectedValue, raise_errors, schema_error, show, show_name
from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.config.strict_yaml import Value
from qwen3next_train.config.validate import expand_interval, layer_violations, model_violations
from qwen3next_train.errors import ConfigError

MTP_KEY = "mtp_num_hidden_layers"
"""Where Qwen's newer configs state the MTP depths; Qwen3-Next's own published config.json does not."""

_FIXED: Mapping[str, tuple[Value, ...]] = {
    "model_type": ("qwen3_next",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_PASSED_OVER = frozenset(
    (
        *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "output_router_logits"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "intermediate_size"),
    )
)
# The depths have Qwen's name there.
_OWN_NAMES = ModelConfig.model_fields.keys() - {"mtp_num_layers"}
_SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "full_attention_interval", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "tie_word_embeddings", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "router_aux_loss_coef"),
)
"""Keys that mean the same there. A key of ours that is not among them says how the model is trained, or what
transformers cannot vary, and is not exported."""
# transformers' defaults (Qwen3NextConfig, 5.23) where they are not the schema's.
_DEFAULTS: Mapping[str, Value] = {"max_position_embeddings": 32768, "rope_theta": 10000.0}


def tolerates(name: str) -> bool:
    """Whether ``model.<name>`` in YAML is a key of ``config.json`` that is none of ours."""
    return name in _FIXED or name in _PASSED_OVER or name in ("rope_parameters", MTP_KEY)


def convert(name: str, value: Value) -> Converted:
    """Settings that such a key gives, by dotted name.

    Raises:
        RejectedValue: when the value is not what Qwen3-Next here is.
    """
    if name == MTP_KEY:
        return {"model.mtp_num_layers": value}
    if name == "rope_parameters":
        return _rope(value)
    if name in _FIXED and not any(_same(value, accepted) for accepted in _FIXED[name]):
        expected = show(_FIXED[name][0])
        raise RejectedValue(f"only {expected} is supported (got {show(value)}); give {expected} or leave the key out")
    return {}


def model_config_from_hf(data: Mapping[str, Any], origin: str, *, mtp_num_layers: int = 0) -> ModelConfig:
    """The model of a ``config.json``.

    Args:
        data: the parsed file.
        origin: its name, which begins every error line.
        mtp_num_layers: MTP depths when the file does not say (the published one does not, although its
            weights hold one depth).

    Raises:
        ConfigError: one line per key whose value is wrong or describes another model.
    """
    where = show_name(origin)
    if data.get("model_type") != "qwen3_next":
        got = show(data.get("model_type"))
        raise ConfigError(f"{where}: model_type: not qwen3_next (got {got}); name a Qwen3-Next checkpoint")
    given, lines = _settings(data, where)
    settings = {**_DEFAULTS, "mtp_num_layers": mtp_num_layers, **given}
    try:
        model = ModelConfig.model_validate(settings)
    except ValidationError as error:
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"]))
            lines.append(f"{where}: {name}: {schema_error(detail, hint_at(('model', *detail['loc'])))}")
        raise_errors(lines)
        raise
    violations = list(layer_violations(model))
    if not violations:
        model = with_layer_types(model)
        violations = list(model_violations(model))
    raise_errors([*lines, *(f"{where}: {violation.keys[0]}: {violation.message}" for violation in violations)])
    return model


def model_config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """``config.json`` for transformers' ``Qwen3NextForCausalLM``; ``model.layer_types`` is resolved.

    Raises:
        ConfigError: when the model has no counterpart there.
    """
    lines = []
    if not model.attention_output_gate:
        lines.append("model.attention_output_gate: false cannot be exported; transformers' Qwen3-Next always has it")
    if not (model.shared_expert_gate and model.shared_expert_intermediate_size):
        lines.append(
            "model.shared_expert_gate: a model without a gated shared expert cannot be exported; transformers' "
            "Qwen3-Next always has it"
        )
    raise_errors(lines)
    result: dict[str, Any] = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    result |= model.model_dump(include=set(_SHARED))
    if expand_interval(model.full_attention_interval, model.num_hidden_layers) != model.layer_types:
        del result["full_attention_interval"]
    result |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "mlp_only_layers": [],
        # Both spellings: transformers 5 reads the mapping, 4 and most servers the two plain keys.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rope_theta,
            "partial_rotary_factor": model.partial_rotary_factor,
        },
        "rope_theta": model.rope_theta,
        "partial_rotary_factor": model.partial_rotary_factor,
        MTP_KEY: model.mtp_num_layers,
        "use_cache": True,
    }
    return result


def _settings(data: Mapping[str, Any], where: str) -> tuple[dict[str, Value], list[str]]:
    """Model settings that a ``config.json`` gives, and a line for each key that is wrong or contradicts another."""
    settings: dict[str, Value] = {}
    names: dict[str, str] = {}
    lines = []
    for name, value in data.items():
        converted: Converted = {}
        if tolerates(name):
            try:
                converted = convert(name, value)
            except RejectedValue as error:
                lines.append(f"{where}: {name}: {error}")
        elif name in _OWN_NAMES and not (name == "layer_types" and value is None):
            converted = {name: value}
        for key, item in converted.items():
            key = key.removeprefix("model.")
            first = names.setdefault(key, name)
            # transformers 5 would read the mapping, transformers 4 and most servers the plain key.
            if first != name and settings[key] != item:
                lines.append(
                    f"{where}: {name}: {key} {show(item)} contradicts {show(settings[key])} given as {first}; keep one"
                )
            settings[key] = item
    return settings, lines


def _rope(value: Value) -> Converted:
    hint = "give rope_type default, rope_theta and partial_rotary_factor"
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RejectedValue(f"not a mapping (got {show(value)}); {hint}")
    names = {"rope_theta", "partial_rotary_factor"}
    unknown = sorted(value.keys() - names - {"rope_type"})
    if unknown or value.get("rope_type", "default") != "default":
        got = show(value.get(unknown[0]) if unknown else value["rope_type"])
        raise RejectedValue(f"{unknown[0] if unknown else 'rope_type'} is not supported (got {got}); {hint}")
    return {f"model.{name}": value[name] for name in sorted(names & value.keys())}


def _same(value: Value, accepted: Value) -> bool:
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)
