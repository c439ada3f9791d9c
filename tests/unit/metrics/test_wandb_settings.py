"""What wandb is told: the configuration first, then the variables, then what stands in for both."""

import re

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import WandbConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.metrics.wandb_settings import (
    check_settings,
    init_timeout_s,
    new_run_id,
    page_settings,
    resolve_mode,
)

ENVIRON = {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_TAGS": "a, b,,"}
OF_ENVIRON = {"project": "p", "entity": "e", "name": "n", "tags": ["a", "b"]}


def check(mode, environ, **config):
    check_settings(WandbConfig(mode=mode, **config), environ, writes=True)


def test_run_ids():
    ids = {new_run_id({}) for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"[a-z0-9]{8}", run_id) for run_id in ids)


@pytest.mark.parametrize(
    ("configured", "variable", "mode"),
    [
        ("auto", None, "online"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "", "online"),
        ("auto", " Offline ", "offline"),
        ("online", "disabled", "online"),
        ("offline", "online", "offline"),
        ("offline", "nonsense", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_mode(configured, variable, mode):
    assert resolve_mode(configured, {} if variable is None else {"WANDB_MODE": variable}) == mode


@pytest.mark.parametrize("text", ["nonsense", "on", "0", "off line", "\n\x1b[2J"])
def test_a_mode_that_is_none_is_an_error(text):
    with pytest.raises(ConfigError) as caught:
        check("auto", {"WANDB_MODE": text})
    line = str(caught.value)
    assert line.startswith(f"WANDB_MODE: not a mode (got {text.strip()!a}); give online, offline or disabled")
    assert line.isprintable()
    check("offline", {"WANDB_MODE": text})
    check("auto", {"WANDB_MODE": text, "WANDB_DISABLED": "true"})


def test_an_id_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match=r"^WANDB_RUN_ID: not an id that wandb takes \(got 'a/b'\); unset it"):
        check("auto", {"WANDB_RUN_ID": "a/b"})
    check("disabled", {"WANDB_RUN_ID": "a/b"})
    check("online", {"WANDB_RUN_ID": "sweep-1"})


@pytest.mark.parametrize(
    ("text", "mode"), [("true", "disabled"), ("1", "disabled"), ("false", "online"), ("", "online")]
)
def test_disabled_variable(text, mode):
    assert resolve_mode("auto", {"WANDB_DISABLED": text}) == mode
    assert resolve_mode("online", {"WANDB_DISABLED": text}) == "online"


@pytest.mark.parametrize(("text", "is_taken"), [("sweep-1", True), ("a/b", False), ("", False), ("x" * 129, False)])
def test_run_id_of_the_environment(text, is_taken):
    assert (new_run_id({"WANDB_RUN_ID": text}) == text) is is_taken


def test_variables_hold_where_the_configuration_says_nothing():
    assert page_settings(WandbConfig(), "dir", ENVIRON) == OF_ENVIRON
    # The project's default, said by the user, is said.
    loaded = load_config([], [("logging.wandb.project", "qwen3next")]).config.logging.wandb
    assert page_settings(loaded, "dir", ENVIRON) == {**OF_ENVIRON, "project": "qwen3next"}
    assert page_settings(load_config([]).config.logging.wandb, "dir", ENVIRON) == OF_ENVIRON


def test_the_configuration_comes_first():
    config = WandbConfig(project="P", entity="E", name="N", tags=["T"])
    assert page_settings(config, "dir", ENVIRON) == {"project": "P", "entity": "E", "name": "N", "tags": ["T"]}


def test_neither_says_anything():
    for environ in ({}, dict.fromkeys(ENVIRON, ""), dict.fromkeys(ENVIRON, " ")):
        assert page_settings(WandbConfig(), "dir", environ) == {
            "project": "qwen3next",
            "entity": None,
            "name": "dir",
            "tags": [],
        }


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("WANDB_PROJECT", "a/b", "not a project that wandb takes (got 'a/b'); give at most 128"),
        ("WANDB_PROJECT", "x" * 129, "not a project that wandb takes"),
        ("WANDB_TAGS", "a,b," + "c" * 65, "a tag that is empty or longer than 64"),
        ("WANDB_INIT_TIMEOUT", "abc", "not a number of seconds up to 86400 (got 'abc'); change or unset it"),
        ("WANDB_INIT_TIMEOUT", "nan", "not a number of seconds"),
        ("WANDB_INIT_TIMEOUT", "0", "not a number of seconds"),
        ("WANDB_INIT_TIMEOUT", "-3", "not a number of seconds"),
        ("WANDB_INIT_TIMEOUT", "9" * 400, "not a number of seconds"),
        ("WANDB_DIR", "/dev/null/none", "not a folder that can be written (got '/dev/null/none'); make it or unset it"),
        ("WANDB_DIR", "/dev/null", "not a folder that can be written"),
    ],
)
def test_what_would_turn_wandb_off_is_an_error(variable, text, complaint):
    with pytest.raises(ConfigError) as caught:
        check("auto", {variable: text})
    assert str(caught.value).startswith(f"{variable}: {complaint}")
    assert str(caught.value).isprintable()
    check("disabled", {variable: text})
    check("auto", {variable: text, "WANDB_MODE": "disabled"})
    if variable == "WANDB_DIR":
        check_settings(WandbConfig(), {variable: text}, writes=False)


def test_what_the_configuration_says_is_checked_instead():
    bad = {"WANDB_PROJECT": "a/b", "WANDB_TAGS": "c" * 65}
    check("auto", bad, project="p", tags=["t"])
    with pytest.raises(ConfigError, match=r"^logging\.wandb\.project: not a project that wandb takes \(got 'a#b'\)"):
        check("auto", {}, project="a#b")
    with pytest.raises(ConfigError, match=r"^logging\.wandb\.tags: a tag that is empty or longer than 64 \(got ''\)"):
        check("auto", {}, tags=["a", ""])


def test_time_for_the_start():
    assert [init_timeout_s({"WANDB_INIT_TIMEOUT": text}) for text in ("", " ", "60", "0.5", " 7. ")] == [
        None,
        None,
        60.0,
        0.5,
        7.0,
    ]
    assert init_timeout_s({}) is None
