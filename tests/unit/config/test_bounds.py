"""Numbers that fp32, the data or the machine cannot hold are rejected when the configuration is loaded."""

import math
import os
import sys
from itertools import chain

import pytest

from qwen3next_train.accounting.flops import count_mixers
from qwen3next_train.config.bounds import UnusableText, usable_path
from qwen3next_train.config.describe import keys
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.parameters import parameter_table

TINY = [shipped_folder() / "qwen3next_tiny.yaml"]
NUMERIC = [key.name for key in keys().values() if key.annotation in (int, float)]


def line_of(key: str, value: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [(key, value)])
    return str(raised.value)


@pytest.mark.parametrize("key", NUMERIC)
def test_no_number_is_without_bounds(key):
    # Seeds are only hashed.
    largest = ["9" * 18] if keys()[key].annotation is int and key != "run.seed" else []
    for value in (*largest, "1" + "0" * 30, "1e300", "1e39", "1e400"):
        line = line_of(key, value)
        assert line.startswith(f"--{key}: "), line
        assert len(line.splitlines()) == 1


@pytest.mark.parametrize("key", [name for name in NUMERIC if keys()[name].annotation is float])
def test_no_number_vanishes_in_fp32(key):
    if key not in ("data.validation_fraction", "model.partial_rotary_factor"):
        assert line_of(key, "1e-39").startswith(f"--{key}: too small")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimizer.lr", "1e39", "too large, at most 1e+30 (got 1e+39); give a number >= 0"),
        ("optimizer.beta2", "0.99999999", "too large, at most 0.9999999 (got 0.99999999); give a number >= 0 and < 1"),
        ("run.peer_timeout_s", "1e14", "too large, at most 31536000 (got 100000000000000.0); give a number > 0"),
        ("run.peer_timeout_s", "1e-9", "too small, at least 0.1 (got 1e-09); give a number > 0"),
        ("model.rms_norm_eps", "1e300", "too large, at most 1e+30 (got 1e+300); give a number > 0"),
        ("model.rms_norm_eps", "1e-50", "too small, at least 1e-30 (got 1e-50); give a number > 0"),
        (
            "run.global_batch_size",
            "100000000000000000",
            "too large, at most 10000000 (got 100000000000000000); give a whole number > 0",
        ),
        ("model.hidden_size", "1000000000000000", "too large, at most 1048576 (got 1000000000000000); give a whole"),
        ("model.rope_theta", "0.5", "too small, at least 1 (got 0.5); give a number > 0"),
        ("run.steps", "100000000", "too large, at most 99999999 (got 100000000); give a whole number > 0"),
        ("data.sequence_length", "2147483648", "too large, at most 16777216 (got 2147483648); give a whole number > 0"),
        ("eval.rows", "1099511627776", "too large, at most 10000000 (got 1099511627776); give a whole number > 0"),
        ("run.steps", "1" + "0" * 20, f"too large (got '1{'0' * 20}'); give a whole number > 0"),
    ],
)
def test_lines(key, value, line):
    assert line_of(key, value).startswith(f"--{key}: {line}")


def test_a_run_is_counted_in_64_bits_and_a_micro_batch_in_32():
    wide = [("run.steps", "99999999"), ("run.global_batch_size", "10000000"), ("data.sequence_length", "16384")]
    roomy = ("model.max_position_embeddings", "16777216")
    with pytest.raises(ConfigError, match="tokens that 64 bits count"):
        load_config(TINY, [*wide, roomy, ("schedule.decay_steps", "0")])
    one_expert = ("model.num_experts_per_tok", "1")
    rows = [("run.global_batch_size", "128"), ("run.micro_batch_size", "128")]
    with pytest.raises(ConfigError, match="more than the 2147483647 rows that kernels count in 32 bits"):
        load_config(TINY, [("data.sequence_length", "16777216"), *rows, roomy, one_expert])
    load_config(TINY, [("data.sequence_length", "16777215"), *rows, roomy, one_expert])


def test_the_largest_model_of_the_schema_has_tensors_that_can_be_addressed():
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "linear_key_head_dim")
    names += ("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "num_experts")
    names += ("moe_intermediate_size", "shared_expert_intermediate_size", "linear_conv_kernel_dim", "vocab_size")
    largest = {name: largest_of(f"model.{name}") for name in names}
    model = ModelConfig(**largest, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    assert count_mixers(model) == (1, 1)
    assert 2**58 < max(4 * spec.numel for spec in parameter_table(model)) < 2**63


def largest_of(key: str) -> int:
    """The largest number a key takes, by bisection."""
    low, high = 2, 2**40
    name = key.partition(".")[2]
    while high - low > 1:
        middle = (low + high) // 2
        try:
            ModelConfig(**{name: middle})
            low = middle
        except ValueError:
            high = middle
    return low


def test_ordinary_numbers_pass():
    ordinary = {
        "optimizer.lr": "1e12",
        "optimizer.eps": "1e-15",
        "optimizer.clip_grad": "0",
        "optimizer.beta2": "0.99999",
        "run.peer_timeout_s": "86400",
        "model.rms_norm_eps": "1e-12",
        "model.rope_theta": "1e8",
        "run.seed": "9" * 18,
        "model.num_experts": "40000",
    }
    config = load_config(TINY, list(chain(ordinary.items()))).config
    assert math.isclose(config.optimizer.eps, 1e-15)


@pytest.mark.parametrize("path", ["a/b", "~/x", "/" + "n" * 255, "../ä ö", "data/*.jsonl", "./~x"])
def test_paths(monkeypatch, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert usable_path(path) == path.replace("~/", "/home/me/")


@pytest.mark.parametrize("path", ["\0", "a\ud800", "n" * 256, "a/" * 2500, "~none-of-us", "é" * 128])
def test_unusable_paths(path):
    with pytest.raises(UnusableText):
        usable_path(path)


@pytest.mark.parametrize("text", ["b\udcc3\udcbc", "b\u00fc"])
def test_a_locale_without_unicode_is_said_as_such(monkeypatch, text):
    """A word of the command line, whose UTF-8 Python has not read, and a file's text, which it cannot write."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii", "surrogateescape"))
    with pytest.raises(UnusableText, match=r"this locale \(ascii; unset PYTHONUTF8 or set LC_ALL=C\.UTF-8\)"):
        usable_path(text)
    assert usable_path("abc") == "abc"
