"""Every rule that spans settings is broken once and its line matched."""

from pathlib import Path

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import Config, ModelConfig, ProfileConfig
from qwen3next_train.config.validate import (
    expand_interval,
    layer_violations,
    profiled_steps,
    rotary_dim,
    validate,
    validate_for_world,
    world_violations,
)
from qwen3next_train.errors import ConfigError

TINY = shipped_folder() / "qwen3next_tiny.yaml"
# What the rules' lines name, whatever the shipped file is tuned to.
FIXED = {
    "run__steps": "300",
    "schedule__warmup_steps": "5",
    "model__num_hidden_layers": "4",
    "model__full_attention_interval": "4",
    "model__num_experts": "8",
}


@pytest.mark.parametrize(("text", "steps"), [("", []), ("3", [3]), ("10-12", [10, 11, 12])])
def test_steps_to_profile(text: str, steps: list[int]) -> None:
    assert list(profiled_steps(ProfileConfig(steps=text))) == steps


def faults_of(**overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([TINY], [(key.replace("__", "."), text) for key, text in (FIXED | overrides).items()])
    return str(caught.value).splitlines()


RULES = [
    (
        {"eval__samples__prompts": "[a, '', b]"},
        "--eval.samples.prompts: eval.samples.prompts has an empty prompt, number 2; give it text",
    ),
    (
        {"eval__samples__prompts": str(["x"] * 65)},
        "--eval.samples.prompts: eval.samples.prompts has 65 prompts; give at most 64",
    ),
    *(
        (
            {f"eval__samples__{name}": text},
            f"--eval.samples.{name}: eval.samples.{name} has nothing to choose from where eval.samples.temperature 0 "
            "takes the likeliest token; give a temperature above 0",
        )
        for name, text in (("top_p", "0.5"), ("top_k", "3"))
    ),
    (
        {"run__steps": "9", "logging__profile__steps": "8-10"},
        "--logging.profile.steps: logging.profile.steps 8-10 is not within the run's steps, 1 to 9; choose steps among "
        "them",
    ),
    (
        {"logging__profile__steps": "0-2"},
        "--logging.profile.steps: logging.profile.steps 0-2 is not within the run's steps, 1 to 300; choose steps "
        "among them",
    ),
    (
        {"logging__profile__steps": "3-2"},
        "--logging.profile.steps: logging.profile.steps 3-2 is not within the run's steps, 1 to 300; choose steps "
        "among them",
    ),
    (
        {"logging__profile__steps": "3-"},
        "--logging.profile.steps: logging.profile.steps is no range of steps (got '3-'); write 10-12, or 10",
    ),
    (
        {"logging__profile__steps": "9" * 5000},
        f"--logging.profile.steps: logging.profile.steps is no range of steps (got '{'9' * 56}...); write 10-12, or 10",
    ),
    (
        {"logging__profile__memory": "[steps]"},
        '--logging.profile.memory: logging.profile.memory has "steps" but logging.profile.steps is empty; name the '
        "steps, such as 10-12",
    ),
    (
        {"parallel__offload_optimizer": "cpu", "parallel__zero_stage": "3"},
        "--parallel.offload_optimizer: parallel.offload_optimizer cpu clips by a wrong gradient norm with "
        "parallel.zero_stage 3; set parallel.zero_stage to 1 or 2, or parallel.offload_optimizer to none",
    ),
    (
        {"parallel__micro_batches_in_flight": "2", "parallel__zero_stage": "3"},
        "--parallel.micro_batches_in_flight: parallel.micro_batches_in_flight 2 does not go with parallel.zero_stage "
        "3; set parallel.zero_stage to 1 or 2, or parallel.micro_batches_in_flight to 1",
    ),
    (
        {"parallel__gradient_dtype": "bf16", "run__precision": "bf16", "parallel__zero_stage": "3"},
        "--parallel.gradient_dtype: parallel.gradient_dtype bf16 does not go with parallel.zero_stage 3; set "
        "parallel.zero_stage to 1 or 2, or parallel.gradient_dtype to fp32",
    ),
    (
        {"parallel__gradient_dtype": "bf16", "run__precision": "fp32"},
        "--parallel.gradient_dtype: parallel.gradient_dtype bf16 does not go with run.precision fp32; set "
        "run.precision to bf16, or parallel.gradient_dtype to fp32",
    ),
    (
        {"optimizer__moments_dtype": "bf16", "optimizer__beta2": "0.999"},
        "--optimizer.beta2: optimizer.beta2 0.999 changes a moment by less than bf16 can hold; with "
        "optimizer.moments_dtype bf16 give at most 0.99, or set optimizer.moments_dtype to fp32",
    ),
    (
        {"model__num_key_value_heads": "3"},
        "--model.num_key_value_heads: model.num_attention_heads 4 is not a multiple of model.num_key_value_heads 3; "
        "change one of them",
    ),
    (
        {"model__linear_num_value_heads": "5"},
        "--model.linear_num_value_heads: model.linear_num_value_heads 5 is not a multiple of "
        "model.linear_num_key_heads 2; change one of them",
    ),
    (
        {"model__partial_rotary_factor": "0.1"},
        "--model.partial_rotary_factor: model.partial_rotary_factor 0.1 x model.head_dim 32 rotates 3 dimensions; RoPE "
        "rotates pairs, so make it an even number above 0",
    ),
    (
        {"model__partial_rotary_factor": "0.001"},
        "--model.partial_rotary_factor: model.partial_rotary_factor 0.001 x model.head_dim 32 rotates 0 dimensions; "
        "RoPE rotates pairs, so make it an even number above 0",
    ),
    (
        {"model__num_experts_per_tok": "9"},
        "--model.num_experts_per_tok: model.num_experts_per_tok 9 is more than model.num_experts 8; send each token to "
        "fewer experts",
    ),
    (
        {"model__shared_expert_intermediate_size": "0"},
        "--model.shared_expert_intermediate_size: model.shared_expert_gate true needs a shared expert but "
        "model.shared_expert_intermediate_size is 0; give a width, or set model.shared_expert_gate to false",
    ),
    (
        {"model__num_hidden_layers": "10001"},
        "--model.num_hidden_layers: model.num_hidden_layers 10001 is more than 10000; choose a smaller number",
    ),
    (
        {"model__layer_types": "[linear_attention]"},
        "--model.layer_types: model.layer_types has 1 entries for model.num_hidden_layers 4; give one per layer, or "
        "model.full_attention_interval instead",
    ),
    (
        {"run__micro_batch_size": "3"},
        "--run.micro_batch_size: run.global_batch_size 16 is not a multiple of run.micro_batch_size 3; change one of "
        "them",
    ),
    (
        {"parallel__expert_parallel_size": "3"},
        "--parallel.expert_parallel_size: parallel.expert_parallel_size 3 does not divide model.num_experts 8; choose "
        "a divisor of both the experts and the world size",
    ),
    (
        # Nor does it divide the row, which would be no help to know.
        {"parallel__context_parallel_size": "3"},
        "--parallel.context_parallel_size: parallel.context_parallel_size 3 does not divide model.num_attention_heads "
        "4, which its ranks share in attention; choose 2, 4 or 1",
    ),
    (
        {
            "parallel__context_parallel_size": "4",
            "model__num_attention_heads": "24",
            "model__num_key_value_heads": "6",
            "data__sequence_length": "300",
        },
        "--parallel.context_parallel_size: parallel.context_parallel_size 4 neither divides model.num_key_value_heads "
        "6 nor is a multiple of it; choose 2, 3, 6, 12 or 1",
    ),
    (
        {"parallel__context_parallel_size": "4", "data__sequence_length": "254"},
        "--parallel.context_parallel_size: parallel.context_parallel_size 4 does not divide data.sequence_length 254 "
        "into equal slices; choose 2 or 1, or make rows of 256 tokens",
    ),
    (
        {"parallel__context_parallel_size": "4", "data__sequence_length": "3"},
        "--parallel.context_parallel_size: parallel.context_parallel_size 4 does not divide data.sequence_length 3 "
        "into equal slices; set it to 1, or make rows of 12 tokens",
    ),
    (
        {"parallel__context_parallel_size": "4", "data__sequence_length": "8"},
        "--parallel.context_parallel_size: parallel.context_parallel_size 4 cuts data.sequence_length 8 into slices of "
        "2, shorter than the 3 tokens that model.linear_conv_kernel_dim 4 looks back; choose 2 or 1, or make rows of "
        "12 tokens",
    ),
    (
        {"parallel__tensor_parallel_size": "4"},
        "--parallel.tensor_parallel_size: parallel.tensor_parallel_size 4 does not divide model.linear_num_key_heads "
        "2, which its ranks share; choose 2 or 1",
    ),
    (
        {"parallel__tensor_parallel_size": "4", "model__num_attention_heads": "6"},
        "--parallel.tensor_parallel_size: parallel.tensor_parallel_size 4 does not divide model.num_attention_heads "
        "6, which its ranks share; choose 2 or 1",
    ),
    (
        {
            "parallel__tensor_parallel_size": "4",
            "model__num_attention_heads": "24",
            "model__num_key_value_heads": "6",
            "model__linear_num_key_heads": "12",
            "model__linear_num_value_heads": "12",
        },
        "--parallel.tensor_parallel_size: parallel.tensor_parallel_size 4 neither divides model.num_key_value_heads 6 "
        "nor is a multiple of it; choose 2 or 1",
    ),
    (
        {"parallel__tensor_parallel_size": "2", "data__sequence_length": "255"},
        "--parallel.tensor_parallel_size: parallel.tensor_parallel_size 2 does not divide data.sequence_length 255 "
        "into equal shares; set it to 1, or make rows of 256 tokens",
    ),
    (
        {"parallel__context_parallel_size": "4", "parallel__tensor_parallel_size": "2"},
        "--parallel.context_parallel_size: parallel.context_parallel_size 4 does not divide model.num_attention_heads "
        "4 / parallel.tensor_parallel_size 2, which its ranks share in attention; choose 2 or 1",
    ),
    (
        {
            "parallel__context_parallel_size": "2",
            "parallel__tensor_parallel_size": "2",
            "data__sequence_length": "250",
        },
        "--parallel.context_parallel_size: parallel.context_parallel_size 2 x parallel.tensor_parallel_size 2 does not "
        "divide data.sequence_length 250 into equal slices; set it to 1, or make rows of 252 tokens",
    ),
    ({"run__dir": " "}, "--run.dir: not a folder name (got ' '); name a folder for the run's files"),
    (
        {"schedule__warmup_steps": "301"},
        "--schedule.warmup_steps: schedule.warmup_steps 301 is more than run.steps 300; lower schedule.warmup_steps",
    ),
    (
        {"schedule__min_lr": "1"},
        "--schedule.min_lr: schedule.min_lr 1.0 is more than optimizer.lr 0.003; lower schedule.min_lr",
    ),
    (
        {"schedule__kind": "wsd", "schedule__decay_steps": "296"},
        "--schedule.decay_steps: schedule.warmup_steps 5 + schedule.decay_steps 296 is more than run.steps 300; "
        "shorten the warm-up or the decay",
    ),
    (
        {"schedule__decay_steps": "4"},
        "--schedule.decay_steps: schedule.decay_steps 4 ends the decay before schedule.warmup_steps 5; it counts from "
        "step 0, warm-up included",
    ),
    (
        {"schedule__rampup_batch_size": "[8, 8]"},
        "--schedule.rampup_batch_size: schedule.rampup_batch_size has 2 numbers (got [8, 8]); give three: START, "
        "INCREMENT and SAMPLES",
    ),
    (
        {"schedule__rampup_batch_size": "[8, 3, 100]"},
        "--schedule.rampup_batch_size: schedule.rampup_batch_size [8, 3, 100] does not lead to run.global_batch_size "
        "16: from 8 in steps of 3; choose a START below 16 and an INCREMENT that divides the difference",
    ),
    (
        {"schedule__rampup_batch_size": "[16, 8, 100]"},
        "--schedule.rampup_batch_size: schedule.rampup_batch_size [16, 8, 100] does not lead to run.global_batch_size "
        "16: from 16 in steps of 8; choose a START below 16 and an INCREMENT that divides the difference",
    ),
    (
        {"schedule__rampup_batch_size": "[12, 2, 100]"},
        "--schedule.rampup_batch_size: schedule.rampup_batch_size [12, 2, 100] begins with or adds what is not a "
        "multiple of run.micro_batch_size 8; change one of them",
    ),
    (
        {"data__sequence_length": "4097"},
        "--data.sequence_length: data.sequence_length 4097 is more than model.max_position_embeddings 4096; shorten "
        "the rows or raise the limit",
    ),
    (
        {"data__sequence_length": "1"},
        "--data.sequence_length: data.sequence_length 1 leaves no target for model.mtp_num_layers 1; make rows longer "
        "than the MTP depth",
    ),
    (
        {"data__sources": ""},
        "--data.sources: a source without a name (got ''); name a file, a data set or builtin:python-stdlib",
    ),
    (
        {"data__validation_sources": "['']"},
        "--data.validation_sources: a source without a name (got ''); name a file, a data set or builtin:python-stdlib",
    ),
    (
        {"data__tokenizer": ""},
        "--data.tokenizer: no tokenizer (got ''); name a tokenizer.json, a folder or builtin:python-4k",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), RULES, ids=[line.split(":")[0] for _, line in RULES])
def test_broken_rule_is_exactly_this_line(overrides, line):
    assert faults_of(**overrides) == [line]


def test_several_broken_rules_are_several_lines():
    lines = faults_of(model__num_experts_per_tok="9", run__micro_batch_size="3")
    assert len(lines) == 2


def test_place_is_the_setting_given_last(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {num_attention_heads: 3}\n")
    with pytest.raises(ConfigError, match=f"^{file}: model.num_attention_heads: "):
        load_config([TINY, file])


def test_min_lr_is_not_read_by_a_constant_schedule():
    load_config([TINY], [("schedule.kind", "constant"), ("optimizer.lr", "1e-9")])


def test_world_size():
    config = load_config([TINY], [("run.micro_batch_size", "4"), ("parallel.expert_parallel_size", "2")]).config
    validate_for_world(config, 2)
    validate_for_world(config, 4)
    with pytest.raises(ConfigError) as caught:
        validate_for_world(config, 3)
    assert str(caught.value).splitlines() == [
        "parallel.expert_parallel_size: 2 does not divide the world size 3; choose 1 or start a multiple of 2 "
        "processes",
        "run.global_batch_size: run.global_batch_size 16 is not a multiple of world size 3 x run.micro_batch_size 4 = "
        "12; choose a multiple of 12, a smaller micro batch or another number of processes",
    ]


def test_micro_batches_in_flight_have_to_exist():
    config = load_config([TINY], [("run.micro_batch_size", "4"), ("parallel.micro_batches_in_flight", "2")]).config
    validate_for_world(config, 2)
    with pytest.raises(ConfigError) as caught:
        validate_for_world(config, 4)
    assert str(caught.value).splitlines() == [
        "parallel.micro_batches_in_flight: 2 needs as many micro-batches a step on each process, but "
        "run.global_batch_size 16 over world size 4 and run.micro_batch_size 4 gives 1; halve run.micro_batch_size, "
        "double run.global_batch_size, or set parallel.micro_batches_in_flight to 1",
    ]


def test_single_rows_in_flight_cannot_be_halved():
    given = [("run.micro_batch_size", "1"), ("parallel.micro_batches_in_flight", "2")]
    config = load_config([TINY], [*given, ("parallel.context_parallel_size", "2")]).config
    validate_for_world(config, 16)
    with pytest.raises(ConfigError) as caught:
        validate_for_world(config, 32)
    assert str(caught.value) == (
        "parallel.micro_batches_in_flight: 2 needs as many micro-batches a step on each process, but "
        "run.global_batch_size 16 over world size 32 / parallel.context_parallel_size 2 and run.micro_batch_size 1 "
        "gives 1; double run.global_batch_size, or set parallel.micro_batches_in_flight to 1"
    )


def test_world_size_with_context_parallelism():
    config = load_config([TINY], [("run.micro_batch_size", "4"), ("parallel.context_parallel_size", "2")]).config
    validate_for_world(config, 8)
    with pytest.raises(ConfigError) as caught:
        validate_for_world(config, 6)
    assert str(caught.value).splitlines() == [
        "run.global_batch_size: run.global_batch_size 16 is not a multiple of world size 6 / "
        "parallel.context_parallel_size 2 x run.micro_batch_size 4 = 12; choose a multiple of 12, a smaller micro "
        "batch or another number of processes",
    ]
    for world_size in (1, 5):
        with pytest.raises(ConfigError) as caught:
            validate_for_world(config, world_size)
        # Nothing can be said of rows then.
        assert str(caught.value) == (
            f"parallel.context_parallel_size: 2 does not divide the world size {world_size}; choose 1 or start a "
            "multiple of 2 processes"
        )


def test_world_size_with_divided_heads():
    sizes = [("parallel.context_parallel_size", "2"), ("parallel.tensor_parallel_size", "2")]
    config = load_config([TINY], [*sizes, ("run.micro_batch_size", "4")]).config
    validate_for_world(config, 16)
    expected = {
        3: "parallel.context_parallel_size: 2 does not divide the world size 3; choose 1 or start a multiple of 2 "
        "processes\nparallel.tensor_parallel_size: 2 does not divide the world size 3; choose 1 or start a multiple of "
        "2 processes",
        6: "parallel.context_parallel_size: parallel.context_parallel_size 2 x parallel.tensor_parallel_size 2 = 4 "
        "does not divide the world size 6; for their product choose one of 1, 2 or start a multiple of 4 processes",
        12: "run.global_batch_size: run.global_batch_size 16 is not a multiple of world size 12 / "
        "(parallel.context_parallel_size 2 x parallel.tensor_parallel_size 2) x run.micro_batch_size 4 = 12; choose a "
        "multiple of 12, a smaller micro batch or another number of processes",
    }
    for world_size, text in expected.items():
        with pytest.raises(ConfigError) as caught:
            validate_for_world(config, world_size)
        assert str(caught.value) == text


@pytest.mark.parametrize(
    ("sizes", "world_size", "fitting"),
    [
        # Eight heads, two of keys and values, eight experts; 3, 6 and 12 divide the world and nothing of the model.
        ({"expert": 8}, 12, [1, 2, 4]),
        ({"context": 8}, 12, [1, 2, 4]),
        ({"tensor": 8}, 12, [1, 2, 4]),
        # What the other size leaves of heads and processes.
        ({"context": 4, "tensor": 2}, 6, [1]),
        ({"context": 8, "tensor": 1}, 20, [1, 2, 4]),
        ({"context": 2, "tensor": 4}, 6, [1]),
    ],
)
def test_sizes_that_a_world_is_offered_are_accepted(sizes: dict[str, int], world_size: int, fitting: list[int]) -> None:
    shape = {"num_attention_heads": 8, "linear_num_key_heads": 8, "linear_num_value_heads": 8, "num_experts": 8}

    def config_of(**sizes: int) -> Config:
        given = {f"model.{key}": value for key, value in shape.items()} | {"run.global_batch_size": 240}
        given |= {f"parallel.{name}_parallel_size": size for name, size in sizes.items()} | {"run.micro_batch_size": 1}
        return load_config([TINY], [(key, str(value)) for key, value in given.items()]).config

    (violation,) = world_violations(config_of(**sizes), world_size)
    name = violation.keys[0].removeprefix("parallel.").removesuffix("_parallel_size")
    listed = ", ".join(map(str, fitting))
    assert f"choose {'one of ' if len(fitting) > 1 else ''}{listed} or start a multiple of " in violation.message
    for size in fitting:
        assert world_violations(config_of(**sizes | {name: size}), world_size) == []


def test_every_batch_of_a_ramp_up_has_to_fit_the_world():
    given = [("run.micro_batch_size", "4"), ("schedule.rampup_batch_size", "[4, 4, 100]")]
    config = load_config([TINY], given).config
    validate_for_world(config, 1)
    with pytest.raises(ConfigError) as caught:
        validate_for_world(config, 2)
    assert str(caught.value) == (
        "schedule.rampup_batch_size: schedule.rampup_batch_size [4, 4, 100] begins with or adds rows that are not a "
        "multiple of world size 2 x run.micro_batch_size 4 = 8; choose multiples, a smaller micro batch or another "
        "number of processes"
    )


def test_world_faults_name_where_the_setting_came_from():
    loaded = load_config([TINY])
    with pytest.raises(ConfigError, match=r"qwen3next_tiny.yaml: run.global_batch_size: .* 16 is not a multiple of"):
        loaded.check_world(4)


def test_zero_stages_are_the_engines_business():
    for stage in "123":
        load_config([TINY], [("parallel.zero_stage", stage)])


def test_unresolved_configuration_is_noticed():
    config = Config(model=ModelConfig(layer_types=["linear_attention"]))
    assert [violation.keys[0] for violation in validate(config)] == ["model.layer_types"]
    assert not list(layer_violations(ModelConfig()))


def test_interval_is_megatrons():
    assert expand_interval(4, 8) == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert expand_interval(1, 2) == ["full_attention"] * 2
    assert expand_interval(5, 4) == ["linear_attention"] * 4
    assert rotary_dim(ModelConfig()) == 64
