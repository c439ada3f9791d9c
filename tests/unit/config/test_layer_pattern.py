"""Megatron-LM's list expressions for --linear-attention-freq."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_train.config.layer_pattern import PatternError, parse_pattern


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        (" 4 ", 4),
        ("(4)", 4),
        ("[1,1,1,0]", [1, 1, 1, 0]),
        ("([1,1,1,0]*12)", [1, 1, 1, 0] * 12),
        ("( [ 1, 1 , 1,0 ] * 12 )", [1, 1, 1, 0] * 12),
        ("12*[1,0]", [1, 0] * 12),
        ("([1]*3+[0]*1)*2", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("[1]*(1+2)+[0]", [1, 1, 1, 0]),
        ("[1]*2*2", [1] * 4),
        ("[]", []),
        ("[1,2]", [1, 2]),
        ("[1]\n*\t2", [1, 1]),
        ("(" * 20 + "[1]" + ")" * 20, [1]),
        ("+".join(["[1,0]"] * 201), [1, 0] * 201),
    ],
)
def test_value(text, value):
    assert parse_pattern(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[1", "[1,]", "[1 1]", "[1,1", "(1", "1)", "[1]*[1]", "[1]+1", "1+[1]", "*2", "[1]**2", "a", "[a]"),
        *("__import__('os')", "[-1]", "[1.0]", "[[1]]", "[1]*-2", "1e9", "٤", "[1]*999999", "9999999", "[1]\0"),
        *("(" * 50 + "[1]" + ")" * 50, "[1]*9999*9999*9999", "999999*999999", "[1]*9999+[1]*2", "1" * 200_000),
        # What Python reads besides.
        *(
            "[1,]",
            "(1,)",
            "1,2",
            "()",
            "[(1)]",
            "[1+1]",
            "01",
            "00",
            "[00]",
            "1_0",
            "0x1",
            "1j",
            "True",
            "'a'",
            "[1]#x",
        ),
        *("[1][0]", "1[0]", "1(2)", "(1)(2)", "+1", "1++1", "1-1", "*[1]", "[*[1]]", "1\\\n+2", "lambda:1", "(a:=1)"),
        # What would be too much for its parser, or for us afterwards.
        *("(" * 21 + "1" + ")" * 21, "(" * 5000, "[" * 5000, "[1" * 5000, "*" * 90_000, "+".join(["1"] * 40_000)),
        *("[00]", "9" * 5000, "[1]*1000000000", "[1]*10**9", "\0", "\ud800"),
    ],
)
def test_refused(text):
    with pytest.raises(PatternError) as caught:
        parse_pattern(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 100


@given(st.text(alphabet="[]()*+,01 24-", max_size=30))
def test_agrees_with_python_or_is_refused(text):
    try:
        value = parse_pattern(text)
    except PatternError:
        return
    assert value == eval(text.strip())  # noqa: S307 - the alphabet holds nothing to call
