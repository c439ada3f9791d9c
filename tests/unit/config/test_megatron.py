"""Every Megatron-LM argument: what it sets, on the command line and in YAML, and which values are refused."""

from pathlib import Path

import pytest

from qwen3next_train.cli.arguments import parse_arguments
from qwen3next_train.config import megatron
from qwen3next_train.config.load import load_config
from qwen3next_train.config.strict_yaml import dump_yaml
from qwen3next_train.errors import ConfigError

LINEAR, FULL = "linear_attention", "full_attention"
# A base small enough that every value below is valid, with settings that differ from all of them.
BASE = """
run: {steps: 500000, global_batch_size: 64, micro_batch_size: 4, seed: 9}
model: {num_experts: 64, mtp_num_layers: 0, shared_expert_intermediate_size: 512}
optimizer: {lr: 1.0e-2}
schedule: {min_lr: 1.0e-6, warmup_steps: 3}
"""

# flag, words after it, the value in YAML, the setting it makes, its value
SETS = [
    ("--linear-conv-kernel-dim", "3", 3, "model.linear_conv_kernel_dim", 3),
    ("--linear-key-head-dim", "64", 64, "model.linear_key_head_dim", 64),
    ("--linear-value-head-dim", "64", 64, "model.linear_value_head_dim", 64),
    ("--linear-num-key-heads", "8", 8, "model.linear_num_key_heads", 8),
    ("--linear-num-value-heads", "64", 64, "model.linear_num_value_heads", 64),
    ("--linear-attention-freq", "3", 3, "model.full_attention_interval", 3),
    ("--linear-attention-freq", "3", "3", "model.full_attention_interval", 3),
    ("--linear-attention-freq", "([1,0,1,0]*12)", "([1,0,1,0]*12)", "model.layer_types", [LINEAR, FULL] * 24),
    ("--linear-attention-freq", "( [1, 0] * 24 )", "( [1, 0] * 24 )", "model.layer_types", [LINEAR, FULL] * 24),
    ("--linear-attention-freq", str([0, 1] * 24), [0, 1] * 24, "model.layer_types", [FULL, LINEAR] * 24),
    ("--attention-output-gate", None, True, "model.attention_output_gate", True),
    ("--num-layers", "8", 8, "model.num_hidden_layers", 8),
    ("--hidden-size", "1024", 1024, "model.hidden_size", 1024),
    ("--num-attention-heads", "8", 8, "model.num_attention_heads", 8),
    ("--num-query-groups", "4", 4, "model.num_key_value_heads", 4),
    ("--kv-channels", "128", 128, "model.head_dim", 128),
    ("--norm-epsilon", "1e-5", 1e-5, "model.rms_norm_eps", 1e-5),
    ("--rotary-percent", "0.5", 0.5, "model.partial_rotary_factor", 0.5),
    ("--rotary-base", "10000", 10000, "model.rope_theta", 10000.0),
    ("--max-position-embeddings", "8192", 8192, "model.max_position_embeddings", 8192),
    ("--untie-embeddings-and-output-weights", None, True, "model.tie_word_embeddings", False),
    ("--vocab-size", "4096", 4096, "model.vocab_size", 4096),
    ("--init-method-std", "0.01", 0.01, "model.initializer_range", 0.01),
    ("--num-experts", "128", 128, "model.num_experts", 128),
    ("--moe-router-topk", "4", 4, "model.num_experts_per_tok", 4),
    ("--moe-ffn-hidden-size", "256", 256, "model.moe_intermediate_size", 256),
    ("--moe-shared-expert-intermediate-size", "256", 256, "model.shared_expert_intermediate_size", 256),
    ("--moe-shared-expert-gate", None, True, "model.shared_expert_gate", True),
    ("--moe-router-load-balancing-type", "aux_loss", "aux_loss", "model.router_aux_loss_scope", "micro_batch"),
    ("--moe-router-load-balancing-type", "seq_aux_loss", "seq_aux_loss", "model.router_aux_loss_scope", "sequence"),
    ("--moe-router-load-balancing-type", "global_aux_loss", "global_aux_loss", "model.router_aux_loss_scope", "global"),
    ("--moe-router-load-balancing-type", "none", "none", "model.router_aux_loss_coef", 0.0),
    ("--moe-aux-loss-coeff", "1e-2", 1e-2, "model.router_aux_loss_coef", 0.01),
    ("--moe-z-loss-coeff", "1e-3", 1e-3, "model.router_z_loss_coef", 0.001),
    ("--moe-router-pre-softmax", None, True, "model.norm_topk_prob", False),
    ("--mtp-num-layers", "2", 2, "model.mtp_num_layers", 2),
    ("--mtp-loss-scaling-factor", "0.3", 0.3, "model.mtp_loss_scaling_factor", 0.3),
    ("--no-weight-decay-cond-type", "qwen3_next", "qwen3_next", "optimizer.apply_wd_to_qk_layernorm", True),
    (
        "--no-weight-decay-cond-type",
        "apply_wd_to_qk_layernorm",
        "apply_wd_to_qk_layernorm",
        "optimizer.apply_wd_to_qk_layernorm",
        True,
    ),
    ("--apply-wd-to-qk-layernorm", None, True, "optimizer.apply_wd_to_qk_layernorm", True),
    ("--lr", "1e-3", 1e-3, "optimizer.lr", 1e-3),
    ("--min-lr", "1e-5", 1e-5, "schedule.min_lr", 1e-5),
    ("--lr-decay-style", "cosine", "cosine", "schedule.kind", "cosine"),
    ("--lr-decay-style", "WSD", "WSD", "schedule.kind", "wsd"),
    ("--lr-decay-style", "linear", "linear", "schedule.kind", "linear"),
    ("--lr-decay-style", "constant", "constant", "schedule.kind", "constant"),
    ("--lr-warmup-iters", "7", 7, "schedule.warmup_steps", 7),
    ("--lr-decay-iters", "1000", 1000, "schedule.decay_steps", 1000),
    ("--lr-wsd-decay-iters", "1000", 1000, "schedule.decay_steps", 1000),
    ("--weight-decay", "0.2", 0.2, "optimizer.weight_decay", 0.2),
    ("--clip-grad", "0.5", 0.5, "optimizer.clip_grad", 0.5),
    ("--adam-beta1", "0.8", 0.8, "optimizer.beta1", 0.8),
    ("--adam-beta2", "0.99", 0.99, "optimizer.beta2", 0.99),
    ("--adam-eps", "1e-6", 1e-6, "optimizer.eps", 1e-6),
    ("--train-iters", "1000", 1000, "run.steps", 1000),
    ("--global-batch-size", "32", 32, "run.global_batch_size", 32),
    ("--micro-batch-size", "2", 2, "run.micro_batch_size", 2),
    ("--seed", "7", 7, "run.seed", 7),
    ("--bf16", None, True, "run.precision", "bf16"),
    ("--seq-length", "2048", 2048, "data.sequence_length", 2048),
    ("--tokenizer-model", "123", "123", "data.tokenizer", "123"),
    ("--expert-model-parallel-size", "4", 4, "parallel.expert_parallel_size", 4),
    ("--context-parallel-size", "4", 4, "parallel.context_parallel_size", 4),
    ("--tensor-model-parallel-size", "2", 2, "parallel.tensor_parallel_size", 2),
    ("--save-interval", "7", 7, "checkpoint.interval", 7),
    ("--async-save", None, True, "checkpoint.async_save", True),
    ("--eval-interval", "7", 7, "eval.interval", 7),
    ("--log-interval", "7", 7, "logging.interval", 7),
    ("--wandb-project", "1e5", "1e5", "logging.wandb.project", "1e5"),
    ("--wandb-entity", "me", "me", "logging.wandb.entity", "me"),
    ("--wandb-exp-name", "n", "n", "logging.wandb.name", "n"),
]

# flag, accepted values, refused values
FIXED = [
    ("--linear-attention-type", ["gated_delta_net", "gdn"], ["mamba", "4"]),
    ("--experimental-attention-variant", ["gdn", "gated_delta_net"], ["dsa", "gdn2", "mamba"]),
    ("--normalization", ["RMSNorm"], ["LayerNorm"]),
    ("--position-embedding-type", ["rope"], ["none", "learned_absolute"]),
    ("--hidden-dropout", ["0", "0.0"], ["0.1", "false"]),
    ("--attention-dropout", ["0", "0.0"], ["0.1"]),
    ("--moe-layer-freq", ["1", "([1]*48)", "[1, 1]"], ["2", "true", "([0]*1+[1]*47)", "[]", "x"]),
    ("--moe-router-score-function", ["softmax"], ["sigmoid"]),
    ("--moe-router-dtype", ["fp32"], ["fp64"]),
    ("--moe-token-dispatcher-type", ["alltoall"], ["flex"]),
    ("--optimizer", ["adam"], ["sgd", "muon"]),
    ("--tokenizer-type", ["HuggingFaceTokenizer"], ["GPT2BPETokenizer"]),
    ("--pipeline-model-parallel-size", ["1"], ["2"]),
    ("--expert-tensor-parallel-size", ["1"], ["2"]),
    ("--ffn-hidden-size", ["5120", "1"], []),
    ("--transformer-impl", ["transformer_engine", "local"], []),
    ("--moe-router-load-balancing-type", [], ["sinkhorn", "quantile_balancing"]),
    ("--lr-decay-style", [], ["inverse-square-root"]),
    ("--no-weight-decay-cond-type", [], ["other"]),
    ("--make-vocab-size-divisible-by", ["1187", "128", "1"], ["1000", "0", "-1", "1.5", "x"]),
]
SWITCHES_ON = [
    "--sequence-parallel",
    *("--group-query-attention", "--qk-layernorm", "--apply-layernorm-1p", "--disable-bias-linear", "--swiglu"),
    *("--moe-grouped-gemm", "--moe-permute-fusion", "--use-distributed-optimizer", "--use-mcore-models"),
    *("--disable-jit-fuser",),
]
SWITCHES_REFUSED = ["--add-qkv-bias", "--moe-router-enable-expert-bias", "--fp16"]
# Those that also exist as one of our own keys of the section, or need company; tested on their own below.
ELSEWHERE = ["--data-path", "--rampup-batch-size"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def from_words(base: Path, *words: str):
    return load_config([base], parse_arguments(words, {}).overrides).config


def line_of(base: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_words(base, *words)
    (line,) = str(caught.value).splitlines()
    return line


def value_at(config, key: str):
    for part in key.split("."):
        config = config.model_dump()[part] if not isinstance(config, dict) else config[part]
    return config


def test_the_tables_of_this_test_are_complete():
    tested = {row[0] for row in SETS} | {row[0] for row in FIXED} | {*SWITCHES_ON, *SWITCHES_REFUSED, *ELSEWHERE}
    assert tested == {argument.flag for argument in megatron.arguments()}


@pytest.mark.parametrize(("flag", "word", "_yaml", "key", "value"), SETS)
def test_on_the_command_line(base, flag, word, _yaml, key, value):
    assert value_at(from_words(base, flag, *([] if word is None else [word])), key) == value
    if word is not None:
        assert value_at(from_words(base, f"{flag}={word}"), key) == value
        assert value_at(from_words(base, f"{flag.replace('-', '_').replace('__', '--', 1)}", word), key) == value


@pytest.mark.parametrize("spelling", ["{}", "--{}"])
@pytest.mark.parametrize(("flag", "_word", "value", "key", "expected"), SETS)
def test_in_yaml(base, tmp_path, flag, _word, value, key, expected, spelling):
    name = flag.removeprefix("--")
    section = key.partition(".")[0]
    spellings = [spelling.format(name), spelling.format(name.replace("-", "_"))]
    documents = [{each: value} for each in spellings] + [{section: {each: value}} for each in spellings]
    if spelling == "--{}" or section == "model" or "wd" in flag or "weight-decay-cond" in flag:
        documents += [{"model": {each: value}} for each in spellings]
    for document in documents:
        if key.endswith(section):
            continue
        path = tmp_path / "given.yaml"
        path.write_text(dump_yaml(document))
        assert value_at(load_config([base, path]).config, key) == expected, document


@pytest.mark.parametrize(("flag", "accepted", "refused"), FIXED)
def test_fixed_values(base, tmp_path, flag, accepted, refused):
    unchanged = load_config([base]).config
    path = tmp_path / "given.yaml"
    for word in accepted:
        assert from_words(base, flag, word) == unchanged
        path.write_text(f"{flag}: {word}\n")
        assert load_config([base, path]).config == unchanged
    for word in refused:
        line = line_of(base, flag, word)
        assert line.startswith(f"{flag}: ")
        assert word in line
        assert "; " in line


@pytest.mark.parametrize("flag", SWITCHES_ON)
def test_switches_that_state_what_is_so(base, tmp_path, flag):
    assert from_words(base, flag) == load_config([base]).config
    path = tmp_path / "given.yaml"
    path.write_text(f"model:\n  {flag}: true\n")
    assert load_config([base, path]).config == load_config([base]).config


@pytest.mark.parametrize("flag", SWITCHES_REFUSED)
def test_switches_that_cannot_be_honoured(base, tmp_path, flag):
    assert "only false is supported (got true); " in line_of(base, flag)
    path = tmp_path / "given.yaml"
    path.write_text(f"{flag}: false\n")
    assert load_config([base, path]).config == load_config([base]).config


def test_switched_off_in_yaml(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text(
        "attention-output-gate: false\nuntie-embeddings-and-output-weights: false\nmoe-shared-expert-gate: false\n"
        "bf16: false\napply-wd-to-qk-layernorm: false\n"
    )
    config = load_config([path]).config
    model = config.model
    assert (model.attention_output_gate, model.tie_word_embeddings, model.shared_expert_gate) == (False, True, False)
    assert (config.run.precision, config.optimizer.apply_wd_to_qk_layernorm) == ("fp32", False)


def test_what_the_model_fixes_cannot_be_switched_off(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("qk-layernorm: false\nmodel: {swiglu: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(caught.value).splitlines() == [
        f"{path}: qk-layernorm: only true is supported (got false); Qwen3-Next normalises queries and keys",
        f"{path}: model.swiglu: neither true nor false (got 1); give true or false",
    ]


@pytest.mark.parametrize(
    "word",
    ["0", "-1", "4.0", "true", "[1,2]", "[1,1", "[]", "([1,1,1,0]*12", "[a]", "import os", "1e9", "[[1]]", "[1]*99999"],
)
def test_wrong_layer_patterns(base, word):
    line = line_of(base, "--linear-attention-freq", word)
    assert line.startswith("--linear-attention-freq: not a layer pattern (got ")
    assert "([1,1,1,0]*12)" in line


def test_layer_pattern_of_wrong_length(base):
    assert line_of(base, "--linear-attention-freq", "([1,1,1,0]*11)") == (
        "--linear-attention-freq (model.layer_types): model.layer_types has 44 entries for model.num_hidden_layers 48; "
        "give one per layer, or model.full_attention_interval instead"
    )


def test_list_pattern_works_with_mtp(base):
    model = from_words(base, "--linear-attention-freq", "([1,1,1,0]*12)", "--mtp-num-layers", "1").model
    assert (len(model.layer_types), model.mtp_num_layers, model.full_attention_interval) == (48, 1, 4)


def test_interval_semantics(base):
    model = from_words(base, "--num-layers", "6", "--linear-attention-freq", "3").model
    assert [i for i, kind in enumerate(model.layer_types) if kind == FULL] == [2, 5]


def test_shared_expert_gate_without_a_size():
    with pytest.raises(ConfigError, match=r"^--moe-shared-expert-gate .model.shared_expert_gate.: .* without a shared"):
        load_config([], [("moe-shared-expert-gate", "true")])
    load_config([], [("moe-shared-expert-gate", "true"), ("moe-shared-expert-intermediate-size", "512")])
    load_config([], [("moe-shared-expert-gate", "true"), ("model.shared_expert_intermediate_size", "512")])
    load_config([], [("moe-shared-expert-gate", "true"), ("model.preset", "tiny")])
    load_config([], [("model.shared_expert_gate", "true")])
    with pytest.raises(ConfigError, match="needs a shared expert"):
        load_config([], [("moe-shared-expert-gate", "true"), ("moe-shared-expert-intermediate-size", "0")])


def test_wsd_reads_its_own_decay_length(base):
    line = line_of(base, "--lr-decay-style", "WSD", "--lr-decay-iters", "1000")
    assert "--lr-wsd-decay-iters" in line


def test_no_balancing_contradicts_a_weight(base):
    line = line_of(base, "--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "1e-3")
    assert "0.001 contradicts 0.0 given as --moe-router-load-balancing-type" in line


def test_data_path(base):
    config = from_words(base, "--data-path", "a, b_text_document")
    assert [source.source for source in config.data.sources] == ["a, b_text_document"]


def test_padding_is_named(base):
    assert line_of(base, "--make-vocab-size-divisible-by", "1000") == (
        "--make-vocab-size-divisible-by: 1000 would pad model.vocab_size 151936 "
        "to 152000; set model.vocab_size to 152000 or leave the argument out (nothing is padded silently)"
    )


def test_bare_names_of_other_sections_are_not_model_settings(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("model: {lr: 1e-3}\n")
    with pytest.raises(ConfigError, match=r"model.lr: unknown key \(got 0.001\); did you mean optimizer.lr\?"):
        load_config([path])


def test_a_whole_megatron_command_line(tmp_path):
    line = """--num-layers 48 --hidden-size 2048 --num-attention-heads 16 --group-query-attention --num-query-groups 2
    --kv-channels 256 --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --ffn-hidden-size 5120
    --num-experts 512 --moe-router-topk 10 --moe-ffn-hidden-size 512 --moe-router-load-balancing-type global_aux_loss
    --moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32 --moe-grouped-gemm --moe-permute-fusion --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope --init-method-std 0.02 --hidden-dropout 0
    --attention-dropout 0 --make-vocab-size-divisible-by 1187 --bf16 --linear-attention-type gated_delta_net
    --linear-attention-freq ([1,1,1,0]*12) --linear-conv-kernel-dim 4 --linear-key-head-dim 128
    --linear-value-head-dim 128 --linear-num-key-heads 16 --linear-num-value-heads 32 --attention-output-gate
    --moe-shared-expert-gate --moe-shared-expert-intermediate-size 512 --no-weight-decay-cond-type qwen3_next
    --rotary-percent 0.25 --rotary-base 10000000 --max-position-embeddings 262144 --apply-layernorm-1p
    --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1"""
    path = tmp_path / "opposite.yaml"
    path.write_text(
        "run: {precision: fp32}\noptimizer: {apply_wd_to_qk_layernorm: false}\n"
        "model: {preset: tiny, vocab_size: 151936, "
        "attention_output_gate: false, shared_expert_gate: false, tie_word_embeddings: true}\n"
    )
    config = load_config([path], parse_arguments(line.split(), {}).overrides).config
    default = load_config([]).config
    assert config.model == default.model
    assert config.optimizer == default.optimizer
    assert config.run == default.run


@pytest.mark.parametrize("words", ["--rampup-batch-size 8 4 640", "--rampup-batch-size=8,4,640"])
def test_ramp_up_takes_three_words(words):
    parsed = parse_arguments([*words.split(), "--seed", "5"], {})
    assert not parsed.positional
    config = load_config([], [*parsed.overrides, ("global-batch-size", "16")]).config
    assert (config.schedule.rampup_batch_size, config.run.seed) == ([8, 4, 640], 5)


def test_ramp_up_in_yaml(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("run: {global_batch_size: 16}\nschedule: {rampup_batch_size: [8, 4, 640]}\n")
    assert load_config([path]).config.schedule.rampup_batch_size == [8, 4, 640]
    path.write_text("global-batch-size: 16\nrampup-batch-size: 8 4 640\n")
    assert load_config([path]).config.schedule.rampup_batch_size == [8, 4, 640]


@pytest.mark.parametrize("text", ["8 4", "8 4 x", "8 4 0", "8 4 -1", "8 4 1.5", "8 4 " + "9" * 19])
def test_a_ramp_up_that_is_not_three_numbers_is_one_line(text):
    with pytest.raises(ConfigError) as caught:
        load_config([], [("rampup-batch-size", text)])
    assert str(caught.value) == (
        f"--rampup-batch-size: not three whole numbers > 0 (got '{text}'); give START, INCREMENT and SAMPLES"
    )


def test_a_ramp_up_of_more_digits_than_python_reads_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^--rampup-batch-size: not three whole numbers > 0 \(got '8 4 9{40,}\.\.\.\); "
    ):
        load_config([], [("rampup-batch-size", "8 4 " + "9" * 5000)])


def test_the_data_path_of_a_blend_has_weights():
    (first, second) = load_config([], [("data-path", "0.3 a.jsonl 7e-1 b")]).config.data.sources
    assert [(each.source, each.weight) for each in (first, second)] == [("a.jsonl", 0.3), ("b", 0.7)]
    for name in ("a b", "2", "2 a 3", "a 2"):
        (source,) = load_config([], [("data-path", name)]).config.data.sources
        assert (source.source, source.weight) == (name, 1.0)
    with pytest.raises(ConfigError, match=r"^--data-path\[0\]\.weight \(data\.sources\[0\]\.weight\): too small"):
        load_config([], [("data-path", "0 a 1 b")])
