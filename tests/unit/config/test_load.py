"""Merging, precedence, provenance, names of keys, the layer pattern."""

import re
from pathlib import Path

import pytest

from qwen3next_train.config.describe import to_yaml
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import PRESETS, shipped_folder
from qwen3next_train.errors import ConfigError

LINEAR, FULL = "linear_attention", "full_attention"
# Enough for a valid configuration of any number of steps.
BASE = "schedule: {warmup_steps: 0}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "a.yaml", base: str = BASE) -> Path:
        path = tmp_path / name
        path.write_text(base + text)
        return path

    return write_file


def lines_of(files, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    return str(caught.value).splitlines()


def model_of(files, *overrides):
    return load_config(files, overrides).config.model


def test_precedence_preset_files_command_line(write):
    first = write("model: {preset: tiny, num_experts: 16}\nrun: {seed: 1, steps: 10}\n")
    second = write("run: {seed: 2}\nlogging: {wandb: {project: p}}\n", "b.yaml")
    config = load_config([first, second], [("--run.steps", "20"), ("logging.wandb.name", "n")]).config
    assert (config.run.seed, config.run.steps) == (2, 20)
    assert (config.model.hidden_size, config.model.num_experts) == (128, 16)
    assert (config.logging.wandb.project, config.logging.wandb.name) == ("p", "n")
    assert config.optimizer.lr == 3e-4  # a preset is a model shape, not a run


def test_preset_on_the_command_line_replaces_the_files_and_stays_below_them(write):
    file = write("model: {preset: tiny, num_experts: 16}\n")
    model = model_of([file], ("model.preset", "1b"))
    assert (model.hidden_size, model.num_experts) == (1024, 16)


def test_origins(write):
    file = write("run: {steps: 3}\nmodel: {--num-layers: 8}\n")
    origins = load_config([file], [("lr", "1e-3")]).origins
    assert origins["run.steps"].place == f"{file}: run.steps"
    assert origins["model.num_hidden_layers"].label("model.num_hidden_layers") == (
        f"{file}: model.--num-layers (model.num_hidden_layers)"
    )
    assert origins["optimizer.lr"].place == "--lr"
    assert "run.seed" not in origins


@pytest.mark.parametrize("name", PRESETS)
def test_resolved_yaml_loads_to_the_identical_configuration(name, tmp_path):
    config = load_config([shipped_folder() / f"qwen3next_{name}.yaml"]).config
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "resolved.yaml"]).config == config


@pytest.mark.parametrize(
    ("text", "interval", "pattern"),
    [
        ("num_hidden_layers: 4", 4, [LINEAR] * 3 + [FULL]),
        ("num_hidden_layers: 2, full_attention_interval: 7", 7, [LINEAR] * 2),
        (f"num_hidden_layers: 3, layer_types: [{LINEAR}, {FULL}, {LINEAR}]", 2, [LINEAR, FULL, LINEAR]),
        (f"num_hidden_layers: 2, layer_types: [{FULL}, {FULL}]", 1, [FULL, FULL]),
        (f"num_hidden_layers: 2, layer_types: [{LINEAR}, {LINEAR}]", 4, [LINEAR, LINEAR]),
        (f"num_hidden_layers: 5, layer_types: [{', '.join([LINEAR] * 5)}]", 6, [LINEAR] * 5),
        (f"num_hidden_layers: 3, layer_types: [{FULL}, {LINEAR}, {LINEAR}]", 4, [FULL, LINEAR, LINEAR]),
        ("num_hidden_layers: 4, layer_types: []", 4, [LINEAR] * 3 + [FULL]),
        (f"num_hidden_layers: 2, layer_types: [{LINEAR}, {FULL}], full_attention_interval: 2", 2, [LINEAR, FULL]),
    ],
)
def test_layer_pattern_is_explicit_and_survives_a_round_trip(write, tmp_path, text, interval, pattern):
    config = load_config([write(f"model: {{{text}}}\n")]).config
    assert (config.model.full_attention_interval, config.model.layer_types) == (interval, pattern)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "again.yaml"]).config == config


def test_interval_and_pattern_that_disagree(write):
    file = write(f"model: {{num_hidden_layers: 2, layer_types: [{LINEAR}, {FULL}], full_attention_interval: 1}}\n")
    assert lines_of([file]) == [
        f"{file}: model.layer_types: model.full_attention_interval 1 makes layer 0 full_attention but "
        "model.layer_types says linear_attention; keep one of the two settings"
    ]


def test_higher_level_replaces_interval_by_pattern_and_back(write):
    interval = write("model: {num_hidden_layers: 4, full_attention_interval: 4}\n")
    assert model_of([interval], ("linear-attention-freq", "[0,1,1,1]")).layer_types == [FULL] + [LINEAR] * 3
    pattern = write(f"model: {{num_hidden_layers: 2, layer_types: [{FULL}, {LINEAR}]}}\n", "b.yaml")
    assert model_of([pattern], ("linear-attention-freq", "2")).layer_types == [LINEAR, FULL]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("'a, b.jsonl'", ["a, b.jsonl"]),
        ("[a, 'b,c']", ["a", "b,c"]),
        ("[{source: a, weight: 2}, b]", ["a", "b"]),
    ],
)
def test_sources(write, text, sources):
    config = load_config([write(f"data:\n  sources: {text}\n")]).config
    assert [source.source for source in config.data.sources] == sources


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a,b c.jsonl", ["a,b c.jsonl"]),
        ("123", ["123"]),
        ("null", ["null"]),
        ("*.jsonl", ["*.jsonl"]),
        ("a: b", ["a: b"]),
        ("[a, b]", ["a", "b"]),
        ("[{source: a, weight: 0.5}]", ["a"]),
    ],
)
def test_sources_on_the_command_line(text, sources):
    config = load_config([], [("data.sources", text)]).config
    assert [source.source for source in config.data.sources] == sources


def test_text_on_the_command_line_is_taken_as_it_stands():
    config = load_config([], [("run.dir", "123"), ("logging.wandb.name", "null"), ("data.tokenizer", "*x: [")]).config
    assert (config.run.dir, config.logging.wandb.name, config.data.tokenizer) == ("123", "null", "*x: [")


def test_numbers_on_the_command_line():
    config = load_config([], [("optimizer.lr", "1"), ("run.seed", "0"), ("logging.wandb.tags", "[a, b]")]).config
    assert (config.optimizer.lr, config.run.seed, config.logging.wandb.tags) == (1.0, 0, ["a", "b"])
    assert type(config.optimizer.lr) is float


TYPE_FAULTS = [
    ("run: {steps: 4.0}", "run.steps: not written as a whole number (got 4.0); write 4"),
    ("run: {steps: 1e6}", "run.steps: not written as a whole number (got 1000000.0); write 1000000"),
    ("run: {steps: 4.5}", "run.steps: not a whole number (got 4.5); give a whole number > 0"),
    ("run: {steps: 1e300}", "run.steps: not a whole number (got 1e+300); give a whole number > 0"),
    ("run: {steps: true}", "run.steps: not a whole number (got true); give a whole number > 0"),
    ("run: {steps: '4'}", "run.steps: not a whole number (got '4'); give a whole number > 0"),
    ("run: {steps: 0}", "run.steps: too small (got 0); give a whole number > 0"),
    ("run: {steps: null}", "run.steps: not a whole number (got null); give a whole number > 0"),
    ("run: {dir: 4}", "run.dir: not text (got 4); give text, in quotes if it looks like a number"),
    ("run: {device: gpu}", "run.device: not one of the choices (got 'gpu'); give one of auto, cpu, cuda"),
    ("run: 3", "run: not a mapping (got 3); put its keys below it, or remove the line"),
    ("run:", "run: not a mapping (got null); put its keys below it, or remove the line"),
    ("parallel: {zero_stage: true}", "parallel.zero_stage: not one of the choices (got true); give one of 1, 2, 3"),
    ("parallel: {zero_stage: 1.0}", "parallel.zero_stage: not one of the choices (got 1.0); give one of 1, 2, 3"),
    ("optimizer: {lr: fast}", "optimizer.lr: not a number (got 'fast'); give a number >= 0"),
    ("optimizer: {lr: 1e400}", "optimizer.lr: not finite (got .inf); give a number >= 0"),
    ("optimizer: {lr: .nan}", "optimizer.lr: not finite (got .nan); give a number >= 0"),
    ("optimizer: {beta1: 1}", "optimizer.beta1: too large (got 1); give a number >= 0 and < 1"),
    (
        "model: {tie_word_embeddings: yes}",
        "model.tie_word_embeddings: neither true nor false (got 'yes'); give true or false",
    ),
    (
        "model: {layer_types: 4}",
        "model.layer_types: not a list (got 4); give a list of linear_attention|full_attention",
    ),
    (
        "model: {layer_types: [mamba]}",
        "model.layer_types[0]: not one of the choices (got 'mamba'); give one of linear_attention, full_attention",
    ),
    ("data: {sources: 4}", "data.sources: not a list (got 4); give a list of sources"),
    (
        "data: {sources: [4]}",
        "data.sources[0]: not a mapping (got 4); give a mapping of source, weight, text_field, split, name, alias",
    ),
    (
        "data: {sources: [{weight: 1}]}",
        "data.sources[0].source: missing (got {'weight': 1}); give text, in quotes if it looks like a number",
    ),
    ("data: {sources: [{source: a, weight: 0}]}", "data.sources[0].weight: too small (got 0); give a number > 0"),
    (
        "data: {sources: [{source: a, wieght: 1}]}",
        "data.sources[0].wieght: unknown key (got 1); did you mean weight? --help all lists every key",
    ),
    ("logging: {wandb: off}", "logging.wandb: not a mapping (got 'off'); put its keys below it, or remove the line"),
    ("logging: {wandb: {tags: a}}", "logging.wandb.tags: not a list (got 'a'); give a list of text"),
    ("model: {preset: 7b}", f"model.preset: unknown preset (got '7b'); give one of {', '.join(PRESETS)}"),
    ("model: {preset: [tiny]}", f"model.preset: unknown preset (got ['tiny']); give one of {', '.join(PRESETS)}"),
]


@pytest.mark.parametrize(("text", "line"), TYPE_FAULTS, ids=[text for text, _ in TYPE_FAULTS])
def test_wrong_value_is_exactly_this_line(write, text, line):
    file = write(text + "\n")
    assert lines_of([file]) == [f"{file}: {line}"]


UNKNOWN = [
    ("model: {hiden_size: 1}", "model.hiden_size", "model.hidden_size"),
    ("run: {lr: 1}", "run.lr", "optimizer.lr"),
    ("data: {sequence_len: 1}", "data.sequence_len", "data.sequence_length"),
    ("modle: {hidden_size: 1}", "modle", "model"),
    ("wandb: {mode: offline}", "wandb", "logging.wandb"),
    ("linear-attention-frq: 4", "linear-attention-frq", "--linear-attention-freq"),
    ("model: {moe_shared_expert_size: 4}", "model.moe_shared_expert_size", None),
    ("logging: {wandb: {projct: x}}", "logging.wandb.projct", "logging.wandb.project"),
]


@pytest.mark.parametrize(("text", "key", "suggestion"), UNKNOWN, ids=[key for _, key, _ in UNKNOWN])
def test_unknown_key_names_the_nearest(write, text, key, suggestion):
    file = write(text + "\n")
    (line,) = lines_of([file])
    assert line.startswith(f"{file}: {key}: unknown key (got ")
    meant = re.search(r"did you mean (\S+)\? --help all lists every key$", line)
    assert meant
    if suggestion:
        assert meant[1] == suggestion


def test_a_name_like_no_other_is_not_guessed_at(write):
    file = write("zzzz: 1\n")
    line = f"{file}: zzzz: unknown key (got 1); no key is called anything like it; --help all lists every key"
    assert lines_of([file]) == [line]


def test_look_alike_letters_are_made_visible(write):
    (line,) = lines_of([write("mod\u0435l: {hidden_size: 1}\n")])
    assert r"'mod\u0435l'" in line
    assert "did you mean model?" in line


def test_key_that_breaks_lines_stays_one_line(write):
    (line,) = lines_of([write('run: {"a\\nb": 1}\n')])
    assert r"'run.a\nb'" in line


def test_dotted_key_in_a_file(write):
    file = write("run.steps: 4\n")
    assert lines_of([file]) == [f"{file}: run.steps: a dotted key (got 4); write 'steps:' below 'run:'"]


def test_every_fault_has_a_line_from_its_own_place(write):
    first = write("run: {steps: x}\n")
    second = write("optimizer: {lr: x}\nrnu: {}\n", "b.yaml")
    lines = lines_of([first, second], [("data.sequence_length", "x"), ("run.sede", "1")])
    places = [line.split(": ")[0] for line in lines]
    assert sorted(places) == sorted([str(first), str(second), str(second), "--data.sequence_length", "--run.sede"])


def test_many_faults_are_cut(write):
    lines = lines_of([write("".join(f"key{i}: 1\n" for i in range(100)))])
    assert len(lines) == 31
    assert lines[-1] == "... and 70 more errors; fix these first"


def test_section_on_the_command_line():
    assert lines_of([], [("logging.wandb", "{mode: offline}")]) == [
        "--logging.wandb: a section (got '{mode: offline}'); give its keys one by one, --logging.wandb.KEY VALUE"
    ]


def test_long_values_are_cut(write):
    (line,) = lines_of([write(f"run: {{steps: {'x' * 1000}}}\n")])
    assert len(line) < 400


def test_two_values_for_one_setting_in_one_file(write):
    file = write("model: {hidden_size: 128, --hidden-size: 256}\n")
    assert lines_of([file]) == [
        f"{file}: model.--hidden-size (model.hidden_size): 256 contradicts 128 given as model.hidden_size; both set "
        "model.hidden_size, keep one"
    ]


def test_two_values_for_one_setting_on_the_command_line():
    assert lines_of([], [("lr", "1e-3"), ("optimizer.lr", "2e-3")]) == [
        "--optimizer.lr: 0.002 contradicts 0.001 given as --lr; both set optimizer.lr, keep one"
    ]


def test_interval_under_two_names(write):
    file = write("model: {full_attention_interval: 3}\nlinear-attention-freq: 4\n")
    (line,) = lines_of([file])
    assert "4 contradicts 3 given as model.full_attention_interval" in line
    (line,) = lines_of(
        [], [("num-layers", "2"), ("linear-attention-freq", "[0,1]"), ("model.full_attention_interval", "2")]
    )
    assert "keep one of the two settings" in line


def test_same_value_under_two_names_is_fine(write):
    file = write("model: {hidden_size: 128, hidden-size: 128}\nnum_layers: 8\nnum-layers: 8\n")
    assert model_of([file]).hidden_size == 128
    assert load_config([], [("lr", "1"), ("optimizer.lr", "1.0")]).config.optimizer.lr == 1


def test_a_repeated_option_counts_last():
    assert load_config([], [("run.seed", "1"), ("run.seed", "2")]).config.run.seed == 2


def test_true_and_one_are_not_the_same_value():
    assert len(lines_of([], [("attention-output-gate", "true"), ("model.attention_output_gate", "1")])) == 2
