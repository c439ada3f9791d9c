"""What JSON's errors are called in lines for people."""

import json

import pytest

from qwen3next_train.config.error_lines import json_problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("9" * 4301, "an integer of more than 4300 digits"),
        ('{"a": [-' + "1" * 6000 + "]}", "an integer of more than 4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_json_problem(text, problem):
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    assert json_problem(caught.value) == problem


def test_a_long_problem_is_cut():
    assert json_problem(ValueError("a\n" * 300)) == "a " * 98 + "a..."
