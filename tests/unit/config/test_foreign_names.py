"""Names of other trainers lead to our keys."""

import pytest

from qwen3next_train.cli.arguments import parse_arguments
from qwen3next_train.cli.commands import OPTIONS
from qwen3next_train.config import huggingface, megatron
from qwen3next_train.config.describe import keys
from qwen3next_train.config.foreign_names import ANSWERS, FAMILIES, KEYS, UNITS, answer, family_answer, own_key
from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import SourceConfig
from qwen3next_train.errors import ConfigError


def test_the_table_names_keys_that_exist_and_no_name_that_is_taken():
    assert set(KEYS.values()) <= {*keys(), *SourceConfig.model_fields}
    assert all(name == name.lower() and "-" not in name for name in (*KEYS, *ANSWERS))
    # Routers and samplers both say top_k; what is no key of the model is taken for the router's.
    own = {key.rpartition(".")[2] for key in keys() if key != "eval.samples.top_k"}
    assert not (KEYS.keys() | ANSWERS.keys()) & own
    assert not [name for name in (*KEYS, *ANSWERS) if megatron.find(name)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("run.lr", "optimizer.lr"),
        ("max_grad_norm", "optimizer.clip_grad"),
        ("per_device_train_batch_size", "run.micro_batch_size"),
        ("run.max_steps", "run.steps"),
        ("output_dir", "run.dir"),
        ("logging_steps", "logging.interval"),
        ("save_total_limit", "checkpoint.keep"),
        ("gradient_checkpointing", "parallel.recompute"),
        ("lr_scheduler_type", "schedule.kind"),
        ("model.n_embd", "model.hidden_size"),
        ("num_nextn_predict_layers", "model.mtp_num_layers"),
        ("optimizer.num_experts", "model.num_experts"),
    ],
)
def test_names_of_other_trainers(tmp_path, name, key):
    section, _, leaf = name.rpartition(".")
    text = f"{section}:\n  {leaf}: 1\n" if section else f"{leaf}: 1\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config([tmp_path / "a.yaml"])
    assert str(raised.value).endswith(f"unknown key (got 1); did you mean {key}? --help all lists every key")
    if not section:
        with pytest.raises(ConfigError) as raised:
            parse_arguments([f"--{leaf.replace('_', '-')}", "1"], OPTIONS)
        assert f"unknown option; did you mean --{key}? --help" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train_samples", "run.steps, which counts optimizer steps"),
        ("lr_warmup_fraction", "schedule.warmup_steps, which counts optimizer steps"),
        ("eval_iters", "eval.rows, which counts rows"),
        ("distributed_timeout_minutes", "run.peer_timeout_s, which is in seconds"),
        ("n_shared_experts", "model.shared_expert_intermediate_size, which is a width"),
    ],
)
def test_a_number_of_another_unit_is_not_to_be_copied(name, hint):
    assert UNITS.keys() <= KEYS.keys()
    with pytest.raises(ConfigError) as raised:
        load_config([], [(name, "1")])
    assert str(raised.value) == f"--{name}: unknown key (got '1'); did you mean {hint}? --help all lists every key"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("num_train_epochs", "run.steps says how long a run is, in optimizer steps"),
        ("run.gradient_accumulation_steps", "it follows from run.global_batch_size"),
        ("text_column", "it is text_field of a source"),
        ("load", "a run goes on in its run.dir by itself, and a new one takes weights from checkpoint.init_from"),
        ("checkpoint.load_dir", "a run goes on in its run.dir"),
        ("split", "data.validation_fraction says how much is held out"),
        ("use_checkpoint_args", "the configuration alone says the settings"),
        ("no_load_optim", "checkpoint.init_from takes the weights alone"),
        ("no_save_optim", "a checkpoint always holds the whole state"),
        ("ckpt_format", "checkpoints have one format"),
        ("exit_duration_in_mins", "SIGTERM or SIGUSR1 saves and stops a run"),
        ("dataloader_type", "run.seed alone says the order"),
        ("tensorboard_dir", "logging.tensorboard true writes event files into RUN/tensorboard"),
        ("log_throughput", "what is logged stands in metrics.jsonl"),
    ],
)
def test_names_that_no_one_key_stands_for(name, text):
    with pytest.raises(ConfigError) as raised:
        load_config([], [(name, "1")])
    assert f"unknown key (got '1'); {text}" in str(raised.value) or f"unknown key (got 1); {text}" in str(raised.value)
    assert str(raised.value).endswith("; --help all lists every key")


def test_fields_of_a_source():
    with pytest.raises(ConfigError, match=r"text_column: unknown key \(got 'x'\); did you mean text_field\?"):
        load_config([], [("data.sources", "[{source: a, text_column: x}]")])


def test_config_json_of_qwen3_next_needs_no_hint():
    published = ("rope_scaling", "hidden_act", "attention_bias", "mlp_only_layers", "decoder_sparse_step", "use_cache")
    assert all(huggingface.tolerates(name) for name in published)


FUSED, SENT = "the kernels section chooses between implementations", "what ranks send and when follows from the par"
LOGGED, PIPELINE = "what is logged stands in metrics.jsonl", "layers are not divided over stages of a pipeline"
ROUTER, ROPE = "every token goes to its likeliest experts", "Qwen3-Next uses RoPE as it is"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("no-masked-softmax-fusion cross-entropy-fusion-impl moe-router-fusion enable-cuda-graph", FUSED),
        ("overlap-grad-reduce delay-wgrad-compute ddp-bucket-size cp-comm-type moe-enable-deepep nccl-ub", SENT),
        ("log-progress timing-log-level one-logger-project log-straggler", LOGGED),
        ("tensorboard-dir tensorboard-queue-size", "logging.tensorboard true writes event files"),
        ("num-layers-per-virtual-pipeline-stage decoder-first-pipeline-num-layers", PIPELINE),
        ("moe-router-num-groups moe-expert-capacity-factor moe-token-drop-policy moe-input-jitter-eps", ROUTER),
        ("use-rotary-position-embeddings rope-scaling-factor no-position-embedding", ROPE),
        ("fp8-format keep-fp8-weight-transpose-cache", "run.precision is bf16 or fp32"),
        ("manual-gc-interval deterministic-mode no-check-for-nan-in-loss-and-grad", "a run does what is right by"),
        ("ckpt-format dist-ckpt-strictness non-persistent-save-interval", "checkpoints have one format"),
        ("squared-relu hidden-act", "experts are SwiGLU"),
        ("multi-latent-attention window-size qk-clip-alpha", "every softmax layer is Qwen3-Next's gated attention"),
        ("distributed-backend", "it follows from run.device"),
    ],
)
def test_switches_of_megatron_that_have_no_place_here_say_why(names, text):
    for name in names.split():
        with pytest.raises(ConfigError) as raised:
            parse_arguments([f"--{name}", "1"], OPTIONS)
        assert str(raised.value).startswith(f"--{name}: unknown option; {text}"), name


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--log-intervall", "--log-interval"),
        ("--rotary-bsae", "--rotary-base"),
        ("--moe-permute-fuson", "--moe-permute-fu"),
    ],
)
def test_a_typing_error_is_no_switch_of_megatron(word, meant):
    with pytest.raises(ConfigError) as raised:
        parse_arguments([word, "1"], OPTIONS)
    assert f"unknown option; did you mean {meant}" in str(raised.value)


def test_no_pattern_stands_for_a_name_of_the_tables():
    assert not [
        name for name in (*KEYS, *ANSWERS) if family_answer(name) and not (answer(name) or own_key(name, keys()))
    ]
    assert all(text.endswith(", leave it out") or "run.precision" in text for _, text in FAMILIES)
