"""The shipped files: found by name, loadable, and what they say they are."""

import pytest

from qwen3next_train.config.describe import flatten
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import PRESETS, find_config, preset_file, shipped_folder
from qwen3next_train.config.resolve import with_layer_types
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.parameters import parameter_table

MEGATRON = "megatron_arguments.yaml"
SHIPPED = sorted(path.name for path in shipped_folder().glob("*.yaml"))


def load(name):
    return load_config([shipped_folder() / name]).config


def num_parameters(config):
    return sum(parameter.numel for parameter in parameter_table(config.model))


def test_every_shipped_file_is_a_preset_a_shape_to_measure_or_a_spelling_and_loads():
    models = [f"qwen3next_{name}.yaml" for name in sorted(PRESETS)]
    shapes = ["bench_ep8_proxy.yaml", "bench_slice4_e512.yaml", MEGATRON]
    # The 80B on one node is a layout of a preset's model, not one of its own.
    assert sorted([*shapes, "qwen3next_80b_8xh200.yaml", *models]) == SHIPPED
    for name in SHIPPED:
        load(name)


def test_80b_is_qwen3_next():
    config = load("qwen3next_80b.yaml")
    assert num_parameters(config) == 81_324_862_720
    assert config.model == with_layer_types(ModelConfig())
    assert config.model.layer_types.count("full_attention") == 12
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.beta1, optimizer.beta2, optimizer.lr, optimizer.clip_grad) == (0.9, 0.95, 3e-4, 1.0)
    assert (schedule.kind, schedule.warmup_steps, schedule.min_lr) == ("cosine", 500, 3e-5)
    assert (config.data.sequence_length, config.run.global_batch_size, config.run.steps) == (4096, 1024, 75_000)
    assert optimizer.weight_decay == 0.1
    assert optimizer.apply_wd_to_qk_layernorm


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != MEGATRON])
def test_only_one_shipped_file_has_megatron_spellings(name):
    assert not [line for line in (shipped_folder() / name).read_text().splitlines() if line.strip().startswith("--")]


def test_megatron_arguments_say_the_80b():
    """Every setting they give is given by the 80B's file too, and has its value; of the model they give all."""
    native, megatron = (load_config([shipped_folder() / name]) for name in ("qwen3next_80b.yaml", MEGATRON))
    assert megatron.config.model == native.config.model
    assert megatron.config.optimizer == native.config.optimizer
    assert megatron.config.schedule == native.config.schedule
    assert set(megatron.origins) <= set(native.origins)
    assert all(origin.flag for origin in megatron.origins.values())
    ours, theirs = (flatten(loaded.config.model_dump()) for loaded in (native, megatron))
    assert {key: theirs[key] for key in megatron.origins} == {key: ours[key] for key in megatron.origins}
    of_model = [{key for key in loaded.origins if key.startswith("model.")} for loaded in (native, megatron)]
    assert of_model[0] == of_model[1]
    assert {key.partition(".")[0] for key in megatron.origins} >= {"run", "data", "parallel"}


def test_80b_on_one_node_is_the_whole_model():
    config, whole = load("qwen3next_80b_8xh200.yaml"), load("qwen3next_80b.yaml")
    assert config.model == whole.model
    rows = config.run.global_batch_size // 8
    assert (rows, config.run.micro_batch_size, config.data.sequence_length) == (4, 2, 4096)
    # The rate goes with the square root of the batch.
    share = (config.run.global_batch_size / whole.run.global_batch_size) ** 0.5
    assert config.optimizer.lr == pytest.approx(whole.optimizer.lr * share, rel=0.06)


def test_1b_has_about_a_billion_parameters():
    assert 0.9e9 < num_parameters(load("qwen3next_1b.yaml")) < 1.1e9


def test_tiny_needs_no_gpu_and_has_every_kind_of_part():
    config = load("qwen3next_tiny.yaml")
    assert (config.run.device, config.run.precision) == ("cpu", "fp32")
    parts = {parameter.part for parameter in parameter_table(config.model)}
    assert parts == {"embedding", "gdn", "attention", "router", "experts", "shared_expert", "norm", "head", "mtp"}


def test_working_directory_comes_before_the_shipped_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("qwen3next_tiny.yaml") == shipped_folder() / "qwen3next_tiny.yaml"
    (tmp_path / "qwen3next_tiny.yaml").write_text("run: {seed: 7}\n")
    assert load_config([find_config("qwen3next_tiny.yaml")]).config.run.seed == 7


def test_missing_file_names_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_config("none.yaml")
    text = str(caught.value)
    assert str(tmp_path) in text
    assert str(shipped_folder()) in text
    assert "qwen3next_tiny.yaml" in text


@pytest.mark.parametrize("name", ["", "dir/none.yaml", "/none.yaml", "a\0b", "x" * 5000, "a\nb.yaml", "../none.yaml"])
def test_odd_names_are_one_line(name):
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unknown_preset():
    with pytest.raises(ConfigError, match="give one of tiny, 20m, 100m, 1b, 3b_a400m, 80b"):
        preset_file("7b")
