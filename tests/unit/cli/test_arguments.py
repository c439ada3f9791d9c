"""Splitting the command line into words."""

import pytest

from qwen3next_train.cli.arguments import Option, parse_arguments, without_option
from qwen3next_train.errors import ConfigError

OPTIONS = {
    option.name: option
    for option in (Option("--config", "FILE", ""), Option("--json", "", ""), Option("--help", "", ""))
}


def fault(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv, OPTIONS)
    return str(caught.value).splitlines()


def test_options_overrides_and_words_in_any_order():
    words = parse_arguments(
        ["plan", "--run.steps", "4", "--config", "a", "--json", "--lr=1e-3", "x", "--config=b", "--bf16", "-h"], OPTIONS
    )
    assert words.positional == ["plan", "x"]
    assert words.options == {"--config": ["a", "b"], "--json": [""], "--help": [""]}
    assert words.overrides == [("run.steps", "4"), ("lr", "1e-3"), ("bf16", "true")]
    assert words.last("--config") == "b"
    assert words.last("--absent") is None


@pytest.mark.parametrize("value", ["-1", "-1e-3", "-.5", "-", "-x", "", " ", "a=b", "a b", "[1, 2]", "true"])
def test_values_are_taken_as_they_stand(value):
    assert parse_arguments(["--optimizer.lr", value], OPTIONS).overrides == [("optimizer.lr", value)]
    assert parse_arguments([f"--optimizer.lr={value}"], OPTIONS).overrides == [("optimizer.lr", value)]


def test_a_value_may_begin_with_two_dashes_after_an_equals_sign():
    assert parse_arguments(["--run.dir=--odd"], OPTIONS).overrides == [("run.dir", "--odd")]


def test_missing_value():
    line = "--run.steps: no value; write --run.steps VALUE"
    assert fault("--run.steps") == [line]
    assert fault("--run.steps", "--json") == [line]
    assert fault("--config") == ["--config: no value; write --config VALUE"]


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--confg", "--config"),
        ("--jsn", "--json"),
        ("--linear-attention-frq", "--linear-attention-freq"),
        ("--steps", "--run.steps"),
        ("-x", None),
        ("--", None),
        ("-config", "--config"),
    ],
)
def test_unknown_option_names_the_nearest(word, suggestion):
    (line,) = fault(word)
    hint = f"did you mean {suggestion}?" if suggestion else "no key is called anything like it;"
    assert line == f"{word}: unknown option; {hint} --help all lists every option"


@pytest.mark.parametrize(
    "argv", [("--bf16=true",), ("--bf16", "true"), ("--bf16", "False"), ("--json=1",), ("--json", "true"), ("--json=",)]
)
def test_a_switch_takes_no_value(argv):
    assert "takes no value" in fault(*argv)[0]


def test_several_faults_are_several_lines():
    assert len(fault("--nope", "--bf16=1", "--run.steps")) == 3


def test_without_option():
    argv = ["--nproc-per-node", "2", "--a", "b", "--nproc-per-node=4", "c"]
    assert without_option(argv, "--nproc-per-node") == ["--a", "b", "c"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--no-async-save", "--async-save (checkpoint.async_save true)"),
        (
            "--no_untie_embeddings_and_output_weights",
            "--untie-embeddings-and-output-weights (model.",
        ),
        ("--no-swiglu", "--swiglu (accepted: experts are SwiGLU)"),
        ("--no-fp16", "--fp16 (rejected: run.precision is bf16 or fp32)"),
    ],
)
def test_the_opposite_of_a_switch_is_not_taken_for_it(word, meant):
    (line,) = fault(word)
    assert line.startswith(f"{word}: unknown option; it would be the opposite of {meant}")


def test_the_opposite_of_a_key_is_written_as_its_value():
    line = "--no-checkpoint.async_save: unknown option; write --checkpoint.async_save false"
    assert fault("--no-checkpoint.async_save") == [line]


@pytest.mark.parametrize("value", ["1", "0", "yes", "No", "on", "OFF", "True"])
def test_a_truth_behind_a_switch_is_no_word_of_its_own(value):
    (line,) = fault("--bf16", value)
    assert line.startswith(f"--bf16: takes no value (got '{value}'); leave the value out")


def test_weights_and_names_of_sources_are_words_of_one_option():
    words = parse_arguments(["plan", "--data-path", "0.3", "a", "7e-1", "b", "--seed", "5"], OPTIONS)
    assert (words.positional, words.overrides) == (["plan"], [("data-path", "0.3 a 7e-1 b"), ("seed", "5")])
    for argv, value, rest in (
        (["--data-path", "a", "plan"], "a", ["plan"]),
        (["--data-path", "1", "a", "plan"], "1 a", ["plan"]),
        (["--data-path", "7"], "7", []),
        (["--data-path=0.3", "a"], "0.3", ["a"]),
    ):
        words = parse_arguments(argv, OPTIONS)
        assert (words.overrides, words.positional) == ([("data-path", value)], rest)
