"""Megatron-LM's spellings of our settings: one table for the command line and for YAML.

Covers the arguments of Megatron-LM's Qwen3-Next support (PR 1989 with 2751, 2752 and 2753), what a full
Qwen3-Next run needs besides, and the ordinary training arguments. An argument either gives one of our
settings, or states something the model fixes (accepted with that value, rejected with another), or chooses
between implementations that compute the same (accepted, without effect).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwen3next_train.config.error_lines import Converted, RejectedValue, show
from qwen3next_train.config.layer_pattern import PatternError, parse_pattern
from qwen3next_train.config.rule_violation import RuleViolation
from qwen3next_train.config.schema import Config
from qwen3next_train.config.strict_yaml import Value, plain_value

VOCAB_MULTIPLE = "megatron.make_vocab_size_divisible_by"
"""Not a setting: checked against ``model.vocab_size`` once that is known."""


@dataclass(frozen=True)
class MegatronArgument:
    """One spelling.

    Args:
        flag: as on Megatron-LM's command line, ``--num-layers``.
        convert: value to our settings by dotted key; raises :class:`RejectedValue`.
        effect: what ``--help`` says it does.
        is_switch: takes no value on the command line.
        is_text: the command line word is taken as it stands, not read as a YAML scalar.
        section: section of the YAML in which the spelling may stand besides the top level.
        num_values: how many of the words behind it on the command line it takes.
    """

    flag: str
    convert: Callable[[Value], Converted]
    effect: str
    is_switch: bool = False
    is_text: bool = False
    section: str = "model"
    num_values: Callable[[Sequence[str]], int] = lambda words: 1


def find(name: str) -> MegatronArgument | None:
    """The argument of a name in any of its forms: ``--num-layers``, ``num-layers``, ``num_layers``."""
    return _BY_NAME.get(_bare(name))


def find_opposite(name: str) -> MegatronArgument | None:
    """The switch that ``--no-NAME`` would turn off; None where there is no such switch."""
    bare = _bare(name)
    argument = _BY_NAME.get(bare.removeprefix("no-"))
    return argument if bare.startswith("no-") and argument is not None and argument.is_switch else None


def arguments() -> Iterator[MegatronArgument]:
    """The table, in the order of ``--help``."""
    yield from _TABLE


def usage_violations(config: Config, flags: Mapping[str, str], vocab_multiple: Value) -> Iterator[RuleViolation]:
    """Broken rules that hold only for settings given under a Megatron-LM name.

    Args:
        config: the resolved configuration.
        flags: settings given by any source, by dotted key; the value is the Megatron-LM flag that gave it or
            empty when it was given under our own name.
        vocab_multiple: value of ``--make-vocab-size-divisible-by``, or None.
    """
    width = "model.shared_expert_intermediate_size"
    if flags.get("model.shared_expert_gate") and config.model.shared_expert_gate and width not in flags:
        yield RuleViolation(
            ("model.shared_expert_gate",),
            "--moe-shared-expert-gate without a shared expert; give --moe-shared-expert-intermediate-size too",
        )
    if config.schedule.kind == "wsd" and flags.get("schedule.decay_steps") == "--lr-decay-iters":
        yield RuleViolation(
            ("schedule.decay_steps",),
            f"--lr-decay-iters {config.schedule.decay_steps} has no meaning with a wsd schedule, which ends at "
            "run.steps; give the length of its final decay as --lr-wsd-decay-iters",
        )
    if vocab_multiple is None:
        return
    vocab = config.model.vocab_size
    if not isinstance(vocab_multiple, int) or isinstance(vocab_multiple, bool) or vocab_multiple < 1:
        text = f"not a whole number > 0 (got {show(vocab_multiple)}); give a divisor of model.vocab_size {vocab}"
        yield RuleViolation((VOCAB_MULTIPLE,), text)
    elif vocab % vocab_multiple:
        padded = -(-vocab // vocab_multiple) * vocab_multiple
        text = f"{vocab_multiple} would pad model.vocab_size {vocab} to {padded}; set model.vocab_size to {padded}"
        yield RuleViolation((VOCAB_MULTIPLE,), f"{text} or leave the argument out (nothing is padded silently)")


def _bare(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


def _renamed(flag: str, key: str, *, is_text: bool = False) -> MegatronArgument:
    section = key.partition(".")[0]
    return MegatronArgument(flag, lambda value: {key: value}, key, is_text=is_text, section=section)


def _switch(flag: str, key: str, *, on: Value = True, off: Value = False) -> MegatronArgument:
    def convert(value: Value) -> Converted:
        return {key: on if _truth(value) else off}

    effect = f"{key} {on if isinstance(on, str) else show(on)}"
    return MegatronArgument(flag, convert, effect, is_switch=True, section=key.partition(".")[0])


def _choice(flag: str, choices: Mapping[str, Converted]) -> MegatronArgument:
    def convert(value: Value) -> Converted:
        if isinstance(value, str) and value.lower() in choices:
            return dict(choices[value.lower()])
        raise RejectedValue(f"not supported (got {show(value)}); give one of {', '.join(choices)}")

    first = next(iter(choices.values()))
    keys = ", ".join(dict.fromkeys(key for settings in choices.values() for key in settings))
    section = next(iter(first)).partition(".")[0]
    return MegatronArgument(flag, convert, f"{keys} ({'|'.join(choices)})", is_text=True, section=section)


def _fixed(flag: str, value: Value, why: str, *others: Value, section: str = "model") -> MegatronArgument:
    def convert(given: Value) -> Converted:
        for accepted in (value, *others):
            if type(given) is not bool and (given == accepted or given == str(accepted)):
                return {}
        raise RejectedValue(f"only {show(value)} is supported (got {show(given)}); {why}")

    values = "|".join(str(each) for each in (value, *others))
    return MegatronArgument(flag, convert, f"only {values}: {why}", is_text=isinstance(value, str), section=section)


def _fixed_switch(flag: str, on: bool, why: str, section: str = "model") -> MegatronArgument:
    def convert(given: Value) -> Converted:
        if _truth(given) is on:
            return {}
        raise RejectedValue(f"only {show(on)} is supported (got {show(given)}); {why}")

    effect = f"accepted: {why}" if on else f"rejected: {why}"
    return MegatronArgument(flag, convert, effect, is_switch=True, section=section)


def _without_effect(flag: str, why: str, *, is_switch: bool = False, section: str = "model") -> MegatronArgument:
    return MegatronArgument(flag, lambda _: {}, f"no effect: {why}", is_switch=is_switch, section=section)


def _truth(value: Value) -> bool:
    if isinstance(value, bool):
        return value
    raise RejectedValue(f"neither true nor false (got {show(value)}); give true or false")


def _layer_pattern(value: Value) -> Converted:
    hint = "give N (every N-th layer softmax) or a list of 1 (linear) and 0 (softmax) such as ([1,1,1,0]*12)"
    if isinstance(value, str):
        try:
            value = [*parsed] if isinstance(parsed := parse_pattern(value), list) else parsed
        except PatternError as error:
            raise RejectedValue(f"not a layer pattern (got {show(value)}): {error}; {hint}") from error
    if isinstance(value, list) and value and all(type(item) is int and item in (0, 1) for item in value):
        return {"model.layer_types": ["linear_attention" if item else "full_attention" for item in value]}
    if type(value) is int and value > 0:
        return {"model.full_attention_interval": value}
    raise RejectedValue(f"not a layer pattern (got {show(value)}); {hint}")


def _rampup(value: Value) -> Converted:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    words = words if isinstance(words, list) else []
    numbers: list[Value] = [plain_value(str(word)) for word in words]
    if len(numbers) != 3 or not all(type(number) is int and number > 0 for number in numbers):
        raise RejectedValue(f"not three whole numbers > 0 (got {show(value)}); give START, INCREMENT and SAMPLES")
    return {"schedule.rampup_batch_size": numbers}


def _all_layers(value: Value) -> Converted:
    try:
        parsed = parse_pattern(value) if isinstance(value, str) else value
    except PatternError:
        parsed = None
    if type(parsed) is int and parsed == 1:
        return {}
    if isinstance(parsed, list | tuple) and parsed and all(type(item) is int and item == 1 for item in parsed):
        return {}
    raise RejectedValue(f"only 1 or a list of 1 is supported (got {show(value)}); {_ALL_EXPERTS}")


def _num_weighted(words: Sequence[str]) -> int:
    """Words of ``WEIGHT NAME WEIGHT NAME ...``, or 1 for a name alone."""
    count = 0
    while count + 1 < len(words) and _WEIGHT.fullmatch(words[count]) and not words[count + 1].startswith("--"):
        count += 2
    return max(count, 1)


def _data_path(value: Value) -> Converted:
    words = value.split() if isinstance(value, str) else []
    if len(words) > 1 and _num_weighted(words) == len(words):
        weighted = zip(words[::2], words[1::2], strict=True)
        return {"data.sources": [{"source": name, "weight": float(weight)} for weight, name in weighted]}
    return {"data.sources": value}


_ALL_EXPERTS = "every layer is a mixture of experts"
_WEIGHT = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
_ONE_MODEL_RANK = "a rank holds all layers, and its experts whole; see parallel.expert_parallel_size"
_NO_BIAS = "Qwen3-Next has no biases"
_NO_DROPOUT = "Qwen3-Next is trained without dropout"
_GDN = "the linear layers are Gated DeltaNet"
_WD = "optimizer.apply_wd_to_qk_layernorm"
_COEF, _SCOPE = "model.router_aux_loss_coef", "model.router_aux_loss_scope"

_TABLE: tuple[MegatronArgument, ...] = (
    # Gated DeltaNet, PR 1989; --experimental-attention-variant is today's name of --linear-attention-type.
    _fixed("--linear-attention-type", "gated_delta_net", _GDN, "gdn"),
    _fixed("--experimental-attention-variant", "gated_delta_net", _GDN, "gdn"),
    MegatronArgument(
        "--linear-attention-freq",
        _layer_pattern,
        "model.full_attention_interval (N: layer i, from 0, is softmax iff (i+1) % N == 0) or model.layer_types",
        is_text=True,
    ),
    _renamed("--linear-conv-kernel-dim", "model.linear_conv_kernel_dim"),
    _renamed("--linear-key-head-dim", "model.linear_key_head_dim"),
    _renamed("--linear-value-head-dim", "model.linear_value_head_dim"),
    _renamed("--linear-num-key-heads", "model.linear_num_key_heads"),
    _renamed("--linear-num-value-heads", "model.linear_num_value_heads"),
    # Attention and the residual stream.
    _switch("--attention-output-gate", "model.attention_output_gate"),
    _renamed("--num-layers", "model.num_hidden_layers"),
    _renamed("--hidden-size", "model.hidden_size"),
    _renamed("--num-attention-heads", "model.num_attention_heads"),
    _fixed_switch("--group-query-attention", True, "heads are grouped by --num-query-groups"),
    _renamed("--num-query-groups", "model.num_key_value_heads"),
    _renamed("--kv-channels", "model.head_dim"),
    _fixed_switch("--qk-layernorm", True, "Qwen3-Next normalises queries and keys"),
    _fixed("--normalization", "RMSNorm", "Qwen3-Next uses RMSNorm"),
    _fixed_switch("--apply-layernorm-1p", True, "norms are zero-centred, (1 + w)"),
    _renamed("--norm-epsilon", "model.rms_norm_eps"),
    _fixed("--position-embedding-type", "rope", "Qwen3-Next uses RoPE"),
    _renamed("--rotary-percent", "model.partial_rotary_factor"),
    _renamed("--rotary-base", "model.rope_theta"),
    _renamed("--max-position-embeddings", "model.max_position_embeddings"),
    _fixed_switch("--disable-bias-linear", True, _NO_BIAS),
    _fixed_switch("--add-qkv-bias", False, _NO_BIAS),
    _fixed("--hidden-dropout", 0, _NO_DROPOUT),
    _fixed("--attention-dropout", 0, _NO_DROPOUT),
    _fixed_switch("--swiglu", True, "experts are SwiGLU"),
    _switch("--untie-embeddings-and-output-weights", "model.tie_word_embeddings", on=False, off=True),
    _renamed("--vocab-size", "model.vocab_size"),
    MegatronArgument(
        "--make-vocab-size-divisible-by",
        lambda value: {VOCAB_MULTIPLE: value},
        "checked: must divide model.vocab_size, which is never padded",
    ),
    _renamed("--init-method-std", "model.initializer_range"),
    # Mixture of experts.
    _renamed("--num-experts", "model.num_experts"),
    _renamed("--moe-router-topk", "model.num_experts_per_tok"),
    _renamed("--moe-ffn-hidden-size", "model.moe_intermediate_size"),
    _without_effect("--ffn-hidden-size", f"{_ALL_EXPERTS}; see --moe-ffn-hidden-size"),
    MegatronArgument("--moe-layer-freq", _all_layers, f"only 1 or ([1]*N): {_ALL_EXPERTS}", is_text=True),
    _renamed("--moe-shared-expert-intermediate-size", "model.shared_expert_intermediate_size"),
    _switch("--moe-shared-expert-gate", "model.shared_expert_gate"),
    _choice(
        "--moe-router-load-balancing-type",
        {
            "aux_loss": {_SCOPE: "micro_batch"},
            "seq_aux_loss": {_SCOPE: "sequence"},
            "global_aux_loss": {_SCOPE: "global"},
            "none": {_COEF: 0.0},
        },
    ),
    _renamed("--moe-aux-loss-coeff", _COEF),
    _renamed("--moe-z-loss-coeff", "model.router_z_loss_coef"),
    _fixed("--moe-router-score-function", "softmax", "Qwen3-Next's router is a softmax"),
    _fixed_switch("--moe-router-enable-expert-bias", False, "an expert bias needs sigmoid scores"),
    _switch("--moe-router-pre-softmax", "model.norm_topk_prob", on=False, off=True),
    _fixed("--moe-router-dtype", "fp32", "the router computes in fp32"),
    _fixed("--moe-token-dispatcher-type", "alltoall", "tokens travel by all-to-all", section="parallel"),
    _fixed_switch("--moe-grouped-gemm", True, "experts are one grouped product; see kernels.grouped_matmul", "kernels"),
    _without_effect("--moe-permute-fusion", "see the kernels section", is_switch=True, section="kernels"),
    # Multi-token prediction.
    _renamed("--mtp-num-layers", "model.mtp_num_layers"),
    _renamed("--mtp-loss-scaling-factor", "model.mtp_loss_scaling_factor"),
    # Optimizer and schedule.
    _choice("--no-weight-decay-cond-type", {"qwen3_next": {_WD: True}, "apply_wd_to_qk_layernorm": {_WD: True}}),
    _switch("--apply-wd-to-qk-layernorm", _WD),
    _fixed("--optimizer", "adam", "the optimizer is AdamW", section="optimizer"),
    _renamed("--lr", "optimizer.lr"),
    _renamed("--min-lr", "schedule.min_lr"),
    _choice(
        "--lr-decay-style",
        {kind: {"schedule.kind": kind} for kind in ("constant", "linear", "cosine", "wsd")},
    ),
    _renamed("--lr-warmup-iters", "schedule.warmup_steps"),
    _renamed("--lr-decay-iters", "schedule.decay_steps"),
    _renamed("--lr-wsd-decay-iters", "schedule.decay_steps"),
    _renamed("--weight-decay", "optimizer.weight_decay"),
    _renamed("--clip-grad", "optimizer.clip_grad"),
    _renamed("--adam-beta1", "optimizer.beta1"),
    _renamed("--adam-beta2", "optimizer.beta2"),
    _renamed("--adam-eps", "optimizer.eps"),
    # The run, its data and its layout.
    _renamed("--train-iters", "run.steps"),
    _renamed("--global-batch-size", "run.global_batch_size"),
    _renamed("--micro-batch-size", "run.micro_batch_size"),
    MegatronArgument(
        "--rampup-batch-size",
        _rampup,
        "schedule.rampup_batch_size (START INCREMENT SAMPLES)",
        is_text=True,
        section="schedule",
        num_values=lambda words: 3,
    ),
    _renamed("--seed", "run.seed"),
    _switch("--bf16", "run.precision", on="bf16", off="fp32"),
    _fixed_switch("--fp16", False, "run.precision is bf16 or fp32", section="run"),
    _renamed("--seq-length", "data.sequence_length"),
    MegatronArgument(
        "--data-path",
        _data_path,
        "data.sources (NAME, or WEIGHT NAME WEIGHT NAME ...)",
        is_text=True,
        section="data",
        num_values=_num_weighted,
    ),
    _renamed("--tokenizer-model", "data.tokenizer", is_text=True),
    _fixed("--tokenizer-type", "HuggingFaceTokenizer", "tokenizers are tokenizer.json files", section="data"),
    _renamed("--expert-model-parallel-size", "parallel.expert_parallel_size"),
    _renamed("--tensor-model-parallel-size", "parallel.tensor_parallel_size"),
    _fixed("--pipeline-model-parallel-size", 1, _ONE_MODEL_RANK, section="parallel"),
    _renamed("--context-parallel-size", "parallel.context_parallel_size"),
    _fixed("--expert-tensor-parallel-size", 1, _ONE_MODEL_RANK, section="parallel"),
    _without_effect(
        "--sequence-parallel",
        "tensor-parallel ranks always share the tokens between mixers",
        is_switch=True,
        section="parallel",
    ),
    _fixed_switch("--use-distributed-optimizer", True, "ZeRO shards the optimizer in every stage", "parallel"),
    _without_effect("--transformer-impl", "layers are this package's own", section="kernels"),
    _without_effect("--use-mcore-models", "layers are this package's own", is_switch=True),
    _without_effect("--disable-jit-fuser", "nothing is jit-fused", is_switch=True, section="kernels"),
    # Checkpoints, validation, logging.
    _renamed("--save-interval", "checkpoint.interval"),
    _switch("--async-save", "checkpoint.async_save"),
    _renamed("--eval-interval", "eval.interval"),
    _renamed("--log-interval", "logging.interval"),
    _renamed("--wandb-project", "logging.wandb.project", is_text=True),
    _renamed("--wandb-entity", "logging.wandb.entity", is_text=True),
    _renamed("--wandb-exp-name", "logging.wandb.name", is_text=True),
)
_BY_NAME = {_bare(argument.flag): argument for argument in _TABLE}
