"""The schema as data, the resolved YAML, the hash, and what counts as which kind of change."""

import pytest
import yaml

from qwen3next_train.config.describe import compare_configs, config_hash, keys, sections, subsections, to_yaml
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import Config, EvalConfig, LoggingConfig
from qwen3next_train.config.settings import PRESET_KEY

TINY = shipped_folder() / "qwen3next_tiny.yaml"
PATTERN = (("linear-attention-freq", "[0,1,1,0]"),)
# What the tests count with, whatever the shipped file is tuned to.
FIXED = {
    "run.steps": "300",
    "schedule.warmup_steps": "5",
    "model.num_hidden_layers": "4",
    "model.full_attention_interval": "4",
    "model.num_experts": "8",
}


def tiny(*overrides):
    given = {name for name, _ in overrides} | ({"model.full_attention_interval"} if overrides[:1] == PATTERN else set())
    return load_config([TINY], [*((k, v) for k, v in FIXED.items() if k not in given), *overrides]).config


def old(config: Config) -> dict:
    return yaml.safe_load(to_yaml(config))


def kinds(before: Config, after: Config, **kwargs) -> dict[str, list[str]]:
    changes = compare_configs(old(before), after, **kwargs)
    return {kind: [change.key for change in getattr(changes, kind)] for kind in ("harmless", "trajectory", "shape")}


def test_every_field_is_a_key_with_type_default_and_description():
    assert {name for name, _ in sections()} == set(Config.model_fields)
    nested = {f"logging.{name}": LoggingConfig.model_fields[name] for name in ("profile", "wandb")}
    nested["eval.samples"] = EvalConfig.model_fields["samples"]
    assert subsections() == {*Config.model_fields, *nested}
    fields = [*Config.model_fields.values(), *nested.values()]
    assert len(keys()) == sum(len(section.annotation.model_fields) for section in fields) - len(nested)
    assert PRESET_KEY not in keys()
    for key in keys().values():
        assert key.description, key.name
        assert "\n" not in key.description
        assert key.type_text
        assert key.hint.startswith("give ")
        assert key.default


@pytest.mark.parametrize(
    ("name", "type_text", "default"),
    [
        ("run.steps", "whole number > 0", "1000"),
        ("run.device", "auto|cpu|cuda", "auto"),
        ("data.validation_fraction", "number >= 0 and < 1", "0.02"),
        ("data.sources", "list of sources", "[builtin:python-stdlib]"),
        ("data.cache_dir", "text", "''"),
        ("model.tie_word_embeddings", "true|false", "false"),
        ("model.layer_types", "list of linear_attention|full_attention", "[]"),
        ("parallel.zero_stage", "1|2|3", "1"),
        ("logging.wandb.tags", "list of text", "[]"),
        ("data.validation_sets", "mapping of names to a list of sources each", "{}"),
    ],
)
def test_type_and_default_text(name, type_text, default):
    assert (keys()[name].type_text, keys()[name].default) == (type_text, default)


def test_yaml_is_plain_and_complete():
    config = tiny(("run.dir", "1e-3"), ("logging.wandb.name", "yes"), ("data.tokenizer", "0123"))
    assert old(config) == config.model_dump()
    assert to_yaml(config) == to_yaml(config)


def test_pattern_without_interval_leaves_the_interval_out():
    config = tiny(*PATTERN)
    assert "full_attention_interval" not in to_yaml(config)


def test_hash_is_that_of_the_trajectory():
    base = config_hash(tiny())
    assert len(base) == 64
    assert base == config_hash(tiny(("run.dir", "elsewhere"), ("logging.interval", "7"), ("run.micro_batch_size", "4")))
    assert base != config_hash(tiny(("optimizer.lr", "1e-3")))
    assert base != config_hash(tiny(("model.num_experts", "16")))
    assert base != config_hash(tiny(("run.steps", "400")))


HARMLESS = [
    *(("logging.interval", "7"), ("logging.wandb.mode", "disabled"), ("checkpoint.keep", "9"), ("eval.rows", "8")),
    *(
        ("run.dir", "x"),
        ("run.device", "auto"),
        ("kernels.gated_delta_rule", "reference"),
        ("parallel.zero_stage", "2"),
    ),
    ("data.validation_sets", "{a: x}"),
    *(("checkpoint.best", "eval/loss"), ("eval.patience", "2"), ("logging.loss_by", "[position]")),
    *(("data.cache_dir", "x"), ("data.num_prefetch_steps", "0"), ("run.micro_batch_size", "4")),
    *(("run.max_skipped_steps", "3"), ("checkpoint.async_save", "false"), ("parallel.expert_parallel_size", "2")),
    *(("parallel.recompute", "[layer]"), ("parallel.offload_optimizer", "cpu"), ("optimizer.moments_dtype", "bf16")),
]
TRAJECTORY = [
    *(("optimizer.lr", "1e-3"), ("run.seed", "1"), ("run.precision", "bf16"), ("run.global_batch_size", "32")),
    *(("data.sources", "x"), ("data.sequence_length", "128"), ("data.tokenizer", "x"), ("schedule.kind", "linear")),
    *(("model.rope_theta", "1e6"), ("model.num_experts_per_tok", "1"), ("model.router_aux_loss_coef", "0")),
    *(("data.validation_fraction", "0.5"), ("data.isolate_documents", "false"), ("run.steps", "200")),
    *(("model.mtp_loss_scaling_factor", "0.2"), ("optimizer.apply_wd_to_qk_layernorm", "false")),
    ("checkpoint.init_from", "x"),
]
SHAPE = [
    *(("model.num_hidden_layers", "3"), ("model.num_experts", "16"), ("model.vocab_size", "8192")),
    *(("model.attention_output_gate", "false"), ("model.tie_word_embeddings", "true"), ("model.mtp_num_layers", "0")),
    *(("model.linear_conv_kernel_dim", "3"), ("model.head_dim", "64"), ("model.shared_expert_gate", "false")),
]


@pytest.mark.parametrize(
    ("kind", "override"),
    [*(("harmless", o) for o in HARMLESS), *(("trajectory", o) for o in TRAJECTORY), *(("shape", o) for o in SHAPE)],
)
def test_class_of_a_change(kind, override):
    found = kinds(tiny(), tiny(override))
    assert override[0] in found[kind]
    assert [name for name, changed in found.items() if changed] == [kind]


def test_an_alias_is_a_name_and_no_change():
    plain, named = (tiny(("data.sources", f"[{{source: x{alias}}}]")) for alias in ("", ", alias: y"))
    assert kinds(plain, named) == {"harmless": [], "trajectory": [], "shape": []}
    assert config_hash(plain) == config_hash(named)


def test_sets_of_a_version_whose_sources_had_fewer_keys_are_the_same():
    stored = old(tiny(("data.validation_sets", "{a: x}")))
    stored["data"]["validation_sets"] = {"a": [{"source": "x"}]}
    assert compare_configs(stored, tiny(("data.validation_sets", "{a: x}"))).harmless == ()


def test_nothing_changed():
    assert kinds(tiny(), tiny()) == {"harmless": [], "trajectory": [], "shape": []}
    changes = compare_configs(old(tiny()), tiny(("optimizer.lr", "1e-3")))
    assert (changes.trajectory[0].old, changes.trajectory[0].new) == (3e-3, 1e-3)


def test_layer_pattern_counts_once():
    found = kinds(tiny(), tiny(("model.full_attention_interval", "2")))
    assert found == {"harmless": [], "trajectory": [], "shape": ["model.layer_types"]}


@pytest.mark.parametrize(
    ("schedule", "step", "kind"),
    [
        ([("schedule.kind", "constant")], None, "harmless"),
        ([("schedule.kind", "cosine")], None, "trajectory"),
        ([("schedule.kind", "linear")], None, "trajectory"),
        ([("schedule.kind", "cosine"), ("schedule.decay_steps", "300")], None, "harmless"),
        ([("schedule.kind", "wsd")], None, "trajectory"),
        ([("schedule.kind", "wsd")], 270, "harmless"),
        ([("schedule.kind", "wsd")], 271, "trajectory"),
        ([("schedule.kind", "wsd"), ("schedule.decay_steps", "100")], 201, "trajectory"),
    ],
)
def test_more_steps_matter_only_if_the_schedule_looks_ahead(schedule, step, kind):
    found = kinds(tiny(*schedule), tiny(*schedule, ("run.steps", "600")), step=step)
    assert found[kind] == ["run.steps"]


@pytest.mark.parametrize(("step", "kind"), [(None, "trajectory"), (0, "trajectory"), (1, "harmless")])
def test_other_initial_weights_matter_until_there_is_a_checkpoint(step, kind):
    found = kinds(tiny(), tiny(("checkpoint.init_from", "x")), step=step)
    assert found[kind] == ["checkpoint.init_from"]


def test_keys_of_other_versions():
    before = old(tiny())
    del before["optimizer"]["eps"]
    before["run"]["gone"] = 1
    before["oddity"] = {"x": 1}
    found = compare_configs(before, tiny())
    assert [change.key for change in found.harmless] == ["run.gone", "oddity"]
    assert not found.trajectory
    assert not found.shape
    del before["run"]["seed"]
    assert [change.key for change in compare_configs(before, tiny(("run.seed", "5"))).trajectory] == ["run.seed"]


def test_sources_stored_without_a_key_of_today_are_unchanged():
    before = old(tiny(("data.sources", "[{source: corpus.jsonl, weight: 2.0}]")))
    del before["data"]["sources"][0]["name"]
    after = tiny(("data.sources", "[{source: corpus.jsonl, weight: 2.0}]"))
    assert compare_configs(before, after).trajectory == ()
    other = tiny(("data.sources", "[{source: corpus.jsonl, weight: 2.0, name: en}]"))
    assert [change.key for change in compare_configs(before, other).trajectory] == ["data.sources"]
