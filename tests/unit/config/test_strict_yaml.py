"""Strict YAML: what scalars mean, what is refused, and that what is written is read back."""

import math
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_train.config.strict_yaml import MAX_BYTES, dump_yaml, parse_scalar, parse_yaml, read_yaml
from qwen3next_train.errors import ConfigError


def read(tmp_path: Path, content: str | bytes):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(tmp_path / "c.yaml: "))
    return text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1e5", 1e5), ("1E+5", 1e5), ("-1.5e-3", -0.0015), (".5", 0.5), ("5.", 5.0), ("+4", 4)),
        *(("0", 0), ("-0", 0), ("12", 12), ("3.0", 3.0), (".inf", math.inf), ("-.inf", -math.inf)),
        *(("true", True), ("false", False), ("True", True), ("null", None), ("~", None), ("", None)),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "n", "0123", "0x1F", "0o17", "12:30:45", "1_000")),
        *((word, word) for word in ("2001-12-14", "e5", ".", "-", "1e", "1.2.3", "tRUE", "1" * 30)),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = parse_yaml(f"k: {text}", "t")["k"] if text != "-" else parse_scalar(text, "t")
    assert parsed == value
    assert type(parsed) is type(value)
    assert parse_scalar(text, "t") == value


def test_nan_is_a_number_so_that_the_schema_can_refuse_it():
    assert math.isnan(parse_scalar(".nan", "t"))


def test_command_line_lists_and_quotes():
    assert parse_scalar("[a, 1, 1e-3]", "--x") == ["a", 1, 0.001]
    assert parse_scalar("'1'", "--x") == "1"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[a",
            "--x: not YAML: expected ',' or ']', but got '<stream end>' (got '[a'); check brackets and quotes; a name ",
        ),
        ("[1]/a.jsonl", "--x: not YAML: expected '<document start>', but found '<scalar>' (got '[1]/a.jsonl'); check "),
        ("{a: *b}", "--x: aliases (*name) are not supported (got '{a: *b}'); write the value out"),
        (f"[{'a' * 100}", f"--x: not YAML: expected ',' or ']', but got '<stream end>' (got '[{'a' * 59}'...); check"),
        ('["\x01"]', """--x: not YAML: unacceptable character #x0001: special characters are not allowed in"""),
    ],
)
def test_a_wrong_word_of_the_command_line_is_shown_and_has_no_line(text, line):
    with pytest.raises(ConfigError) as error:
        parse_scalar(text, "--x")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert "indentation" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "a list instead of sections"),
        ("just words", "a single value instead of sections"),
        ("a: 1\n\tb: 2\n", "tab"),
        ("a:\n\tb: 2\n", "tab"),
        ("a: &x 1\nb: *x\n", "line 1: anchors"),
        ("a: *x\n", "line 1: aliases"),
        ("<<: {a: 1}\n", "merge keys"),
        ("a: !!python/object/apply:os.system ['true']\n", "tags"),
        ("a: !!str 1\n", "tags"),
        ("a: ! 1\n", "tags"),
        ("a: 1\nb: 2\na: 3\n", "a: given twice (lines 1 and 3)"),
        ("m:\n  x: 1\n  x: 1\n", "m.x: given twice (lines 2 and 3)"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: [1, 2\n", "not YAML"),
        ("a: b: c\n", "mapping values are not allowed"),
        ("? [a, b]\n: 1\n", "a key that is not a word"),
        ("a: 'open\n", "not YAML"),
        ("a: \x07\n", "not YAML text ("),
        (b"\xff\xfea\x00:\x00", "not UTF-8"),
        (b"a: \xe9\n", "not UTF-8"),
        ("a:\n" + "".join(" " * i + "- \n" for i in range(1, 60)), "nested deeper"),
        ("[" * 3000 + "]" * 3000, "nested deeper"),
        ("a: 1\n" * 30_000, "more than 20000 values"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_refused_with_one_line(tmp_path, content, expected):
    assert expected in refusal(tmp_path, content)


def test_python_tag_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    refusal(tmp_path, f"a: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert not canary.exists()


def test_alias_bomb_is_refused_at_its_first_anchor(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert "line 1: anchors" in refusal(tmp_path, "\n".join(lines))


def test_byte_order_mark_and_carriage_returns_are_fine(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_pipe_is_read_when_somebody_writes_to_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: empty; give sections"):
        read_yaml(tmp_path / "pipe.yaml")
    reader, writer = os.pipe()
    later = threading.Timer(0.2, lambda: (os.write(writer, b"a: 1\n"), os.close(writer)))
    later.start()
    assert read_yaml(Path(f"/dev/fd/{reader}")) == {"a": 1}
    later.join()
    os.close(reader)


HELD = """
import signal, sys
from pathlib import Path
from qwen3next_train.config.strict_yaml import read_yaml
from qwen3next_train.errors import StoppedBySignal

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
try:
    read_yaml(Path("/dev/stdin"))
except StoppedBySignal as error:
    print(error)
"""


def test_a_signal_that_is_held_ends_the_wait_for_a_silent_pipe():
    """The program holds signals until there is a run directory, whose name is in what it waits for."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HELD], **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("run:")
        child.stdin.flush()
        child.send_signal(signal.SIGTERM)
        assert child.stdout.read() == "/dev/stdin: SIGTERM came before the configuration\n"
    assert child.returncode == 0


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(10**17), 10**17),
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from(["1e-3", "yes", "0123", "", "null", "~", "- a", "a: b", "#x", "'", '"', "\udcff", "é", "<<", "*x"]),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1), inner), max_leaves=12
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_written_values_are_read_back_exactly(value):
    if "<<" in repr(value):
        return  # refused as a key by design
    text = dump_yaml({"k": value})
    assert text.isascii()
    assert parse_yaml(text, "t")["k"] == value


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False))
def test_floats_survive_bit_for_bit_also_in_a_yaml_1_1_reader(value):
    text = dump_yaml({"k": value})
    for back in (parse_yaml(text, "t")["k"], yaml.safe_load(text)["k"]):
        assert struct.pack("d", back) == struct.pack("d", value)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab:-[]{}#'\"|>&*!%@` \n\t0123.", max_size=40))
def test_any_text_parses_or_is_one_line(text):
    message = ""
    try:
        parse_yaml(text, "t")
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
