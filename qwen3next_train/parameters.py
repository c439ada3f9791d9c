"""The parameter table: name, shape, initialisation and treatment of every parameter of the model.

One table drives initialisation, weight-decay groups, planner, checkpoints and export, so that no two of
them can disagree. Names are Hugging Face's module names; the routed experts of a layer are one stacked
tensor each (``gate_up_proj`` ``[E, 2F, D]``, ``down_proj`` ``[E, D, F]``), of which an expert-parallel rank
holds its slice of dimension 0. MTP names follow the published checkpoints: ``mtp.fc``, ``mtp.norm`` and the
two ``mtp.pre_fc_norm_*`` exist once and serve every depth, ``mtp.layers.<k>`` is depth k's layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen3next_train.config.schema import ModelConfig

Part = Literal["embedding", "gdn", "attention", "router", "experts", "shared_expert", "norm", "head", "mtp"]
InitKind = Literal["normal", "uniform", "log_uniform", "inverse_softplus_log_uniform", "constant"]


@dataclass(frozen=True)
class Init:
    """How a parameter starts.

    Args:
        kind: ``normal`` N(0, a), ``uniform`` U(a, b), ``log_uniform`` log of U(a, b), ``constant`` a,
            ``inverse_softplus_log_uniform`` the value whose softplus is exp(U(log a, log b)).
    """

    kind: InitKind
    a: float
    b: float = 0.0


@dataclass(frozen=True)
class Heads:
    """How the heads of a mixer lie in a parameter.

    Args:
        dim: dimension along which they follow one another.
        blocks: sizes of the parts of that dimension, each of which has all heads.
        count: heads, those of Gated DeltaNet counted by their key head.
    """

    dim: int
    blocks: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Args:
        name: Hugging Face name, as ``named_parameters`` of the built model gives it.
        shape: logical shape, all experts included.
        part: what ``plan`` counts it under.
        init: initial distribution.
        fp32: stored and used in fp32 even in a bf16 run.
        expert: dimension 0 is the expert; sharded over the expert-parallel group.
        decay: takes weight decay under Megatron's rule (not 1-D, not a bias).
        qk_norm: a q/k norm weight, decayed when ``optimizer.apply_wd_to_qk_layernorm``.
        heads: what tensor parallelism divides; None for what is the same for all heads.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    init: Init
    fp32: bool = False
    expert: bool = False
    decay: bool = True
    qk_norm: bool = False
    heads: Heads | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


_DT_BIAS_INIT = {"ones": Init("constant", 1.0), "log_uniform": Init("inverse_softplus_log_uniform", 1e-3, 1e-1)}
"""By ``model.linear_dt_init``; the second is that of Mamba-2 and Gated DeltaNet (arXiv 2412.06464)."""


def parameter_table(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the model in the order of ``named_parameters``.

    Initialisation follows Megatron-LM (PR 1989): N(0, initializer_range), output projections divided by
    sqrt(2 * layers), A ~ U(1, 16), dt_bias 1, convolution as torch's Conv1d, zero-centred norms 0.
    """
    hidden = model.hidden_size
    rows: list[ParamSpec] = []
    normal = Init("normal", model.initializer_range)
    rows.append(ParamSpec("model.embed_tokens.weight", (model.vocab_size, hidden), "embedding", normal))
    for index, layer_type in enumerate(model.layer_types):
        prefix = f"model.layers.{index}."
        mixer = _gdn(model, prefix) if layer_type == "linear_attention" else _attention(model, prefix)
        rows += [*mixer, *_moe(model, prefix), *_layer_norms(model, prefix)]
    rows.append(_norm("model.norm.weight", hidden))
    if not model.tie_word_embeddings:
        rows.append(ParamSpec("lm_head.weight", (model.vocab_size, hidden), "head", normal))
    if model.mtp_num_layers:
        rows += _mtp(model)
    return tuple(rows)


def _norm(name: str, size: int, *, one_centred: bool = False, qk_norm: bool = False) -> ParamSpec:
    init = Init("constant", 1.0 if one_centred else 0.0)
    return ParamSpec(name, (size,), "norm", init, decay=False, qk_norm=qk_norm)


def _output_init(model: ModelConfig) -> Init:
    return Init("normal", model.initializer_range / math.sqrt(2 * model.num_hidden_layers))


def _gdn(model: ModelConfig, layer: str) -> list[ParamSpec]:
    prefix = layer + "linear_attn."
    key_dim = model.linear_num_key_heads * model.linear_key_head_dim
    value_heads = model.linear_num_value_heads
    value_dim = value_heads * model.linear_value_head_dim
    width = model.linear_conv_kernel_dim
    normal = Init("normal", model.initializer_range)
    bound = 1 / math.sqrt(width)
    channels = (key_dim, key_dim, value_dim)
    dt_bias, a_log = _DT_BIAS_INIT[model.linear_dt_init], Init("log_uniform", 1.0, 16.0)
    conv = Init("uniform", -bound, bound)
    projected = 2 * key_dim + 2 * value_dim

    def of_heads(name: str, shape: tuple[int, ...], init: Init, *, gate: bool = False) -> ParamSpec:
        heads = Heads(0, channels if name == "conv1d.weight" else shape[:1], model.linear_num_key_heads)
        return ParamSpec(prefix + name, shape, "gdn", init, fp32=gate, decay=not gate, heads=heads)

    return [
        of_heads("dt_bias", (value_heads,), dt_bias, gate=True),
        of_heads("A_log", (value_heads,), a_log, gate=True),
        of_heads("conv1d.weight", (sum(channels), 1, width), conv),
        of_heads("in_proj_qkvz.weight", (projected, model.hidden_size), normal),
        of_heads("in_proj_ba.weight", (2 * value_heads, model.hidden_size), normal),
        _norm(prefix + "norm.weight", model.linear_value_head_dim, one_centred=True),
        _mixer_output(prefix + "out_proj.weight", "gdn", model, value_dim, model.linear_num_key_heads),
    ]


def _mixer_output(name: str, part: Part, model: ModelConfig, width: int, num_heads: int) -> ParamSpec:
    shape, heads = (model.hidden_size, width), Heads(1, (width,), num_heads)
    return ParamSpec(name, shape, part, _output_init(model), heads=heads)


def _attention(model: ModelConfig, layer: str) -> list[ParamSpec]:
    prefix = layer + "self_attn."
    hidden, head_dim = model.hidden_size, model.head_dim
    query_dim = model.num_attention_heads * head_dim
    kv_dim = model.num_key_value_heads * head_dim
    q_rows = query_dim * (2 if model.attention_output_gate else 1)
    normal = Init("normal", model.initializer_range)

    num_heads, num_kv_heads = model.num_attention_heads, model.num_key_value_heads

    def of_heads(name: str, rows: int, count: int) -> ParamSpec:
        heads = Heads(0, (rows,), count)
        return ParamSpec(f"{prefix}{name}.weight", (rows, hidden), "attention", normal, heads=heads)

    return [
        of_heads("q_proj", q_rows, num_heads),
        of_heads("k_proj", kv_dim, num_kv_heads),
        of_heads("v_proj", kv_dim, num_kv_heads),
        _mixer_output(prefix + "o_proj.weight", "attention", model, query_dim, model.num_attention_heads),
        _norm(prefix + "q_norm.weight", head_dim, qk_norm=True),
        _norm(prefix + "k_norm.weight", head_dim, qk_norm=True),
    ]


def _moe(model: ModelConfig, layer: str) -> list[ParamSpec]:
    prefix = layer + "mlp."
    hidden, experts = model.hidden_size, model.num_experts
    ffn, shared = model.moe_intermediate_size, model.shared_expert_intermediate_size
    normal, output = Init("normal", model.initializer_range), _output_init(model)
    rows = [
        ParamSpec(prefix + "gate.weight", (experts, hidden), "router", normal, fp32=True),
        ParamSpec(prefix + "experts.gate_up_proj", (experts, 2 * ffn, hidden), "experts", normal, expert=True),
        ParamSpec(prefix + "experts.down_proj", (experts, hidden, ffn), "experts", output, expert=True),
    ]
    if shared:
        rows += [
            ParamSpec(prefix + "shared_expert.gate_proj.weight", (shared, hidden), "shared_expert", normal),
            ParamSpec(prefix + "shared_expert.up_proj.weight", (shared, hidden), "shared_expert", normal),
            ParamSpec(prefix + "shared_expert.down_proj.weight", (hidden, shared), "shared_expert", output),
        ]
        if model.shared_expert_gate:
            rows.append(ParamSpec(prefix + "shared_expert_gate.weight", (1, hidden), "shared_expert", normal))
    return rows


def _layer_norms(model: ModelConfig, layer: str) -> list[ParamSpec]:
    return [
        _norm(layer + "input_layernorm.weight", model.hidden_size),
        _norm(layer + "post_attention_layernorm.weight", model.hidden_size),
    ]


def _mtp(model: ModelConfig) -> list[ParamSpec]:
    hidden = model.hidden_size
    normal = Init("normal", model.initializer_range)
    rows = [
        _norm("mtp.pre_fc_norm_embedding.weight", hidden),
        _norm("mtp.pre_fc_norm_hidden.weight", hidden),
        ParamSpec("mtp.fc.weight", (hidden, 2 * hidden), "mtp", normal),
    ]
    for depth in range(model.mtp_num_layers):
        prefix = f"mtp.layers.{depth}."
        rows += [*_attention(model, prefix), *_moe(model, prefix), *_layer_norms(model, prefix)]
    rows.append(_norm("mtp.norm.weight", hidden))
    return rows
