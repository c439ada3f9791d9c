"""--help fits a screen, names everything there is by topic, and is as wide as the terminal."""

import re

import pytest

from qwen3next_train.cli.commands import COMMANDS
from qwen3next_train.cli.help_text import help_text
from qwen3next_train.cli.main import main
from qwen3next_train.config import megatron
from qwen3next_train.config.describe import keys, sections

SECTIONS = [section for section, _ in sections()]
TOPICS = [*SECTIONS, "megatron", "all"]
LINES = [["--help"], *(["--help", topic] for topic in TOPICS), *([name, "--help"] for name in COMMANDS)]


@pytest.fixture
def unwrapped(monkeypatch):
    """No line is folded, so that each can be looked at whole."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.mark.parametrize("words", [["--help", "all"], ["--help"]])
def test_every_key_has_one_line_with_type_and_default(unwrapped, words):
    texts = [help_text(words)] if "all" in words else [help_text([*words, section]) for section in SECTIONS]
    text = "\n".join(texts)
    for key in keys().values():
        lines = [line for line in text.splitlines() if line.split()[:1] == [f"--{key.name}"]]
        # Where subcommands are shown too, those that read only some keys name these, without a default.
        (line,) = [line for line in lines if "; default " in line]
        assert key.description in line
        assert line.endswith(f"[{key.type_text}; default {key.default}]")


@pytest.mark.parametrize("topic", ["all", "megatron"])
def test_every_megatron_spelling_has_one_line(unwrapped, topic):
    text = help_text(["--help", topic])
    for argument in megatron.arguments():
        assert len(re.findall(rf"^  {re.escape(argument.flag)} +\S", text, re.MULTILINE)) == 1


def test_every_subcommand_has_its_own_options(unwrapped):
    for command in COMMANDS.values():
        text = help_text([command.name, "--help"])
        for option in command.options:
            assert f"  {option.name} {option.metavar}".rstrip() in text
            assert f"  {option.name} {option.metavar}".rstrip() in help_text(["--help", "all"])
        assert ("--gpus " in text) == (command.name == "plan")
        assert f"  {command.name} " in help_text(["--help"])
        assert command.summary[1:] in text
        assert command.details in text


@pytest.mark.parametrize("columns", [80, 120])
def test_first_help_fits_a_screen_and_names_what_is_needed_first(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_text(["--help"]).splitlines()
    assert len(lines) <= 40
    first = [line.split()[0] for line in lines if line.startswith("  ")]
    for name in (*COMMANDS, "megatron", "all"):
        assert name in first
    assert f"  {', '.join(SECTIONS)}".replace(" ", "") in "".join(lines).replace(" ", "")
    assert [name.removeprefix("--") in keys() for name in first if name.startswith("--")] == [True] * 10
    # One line each.
    assert [line.split()[0] for line in lines if re.match(r"  [a-z-]+  ", line)] == [*COMMANDS, "megatron", "all"]


@pytest.mark.parametrize("columns", [50, 80, 133])
@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", "1000")
    whole = help_text(words)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(words)
    assert max(map(len, text.splitlines())) <= columns
    assert "".join(text.split()) == "".join(whole.split())
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@pytest.mark.parametrize("columns", [50, 80, 133])
def test_help_all_names_every_key(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    named = set(help_text(["--help", "all"]).split())
    assert {f"--{key}" for key in (*keys(), "model.preset")} <= named
    assert {argument.flag for argument in megatron.arguments()} <= named


def test_without_a_terminal_it_is_80_wide(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    widest = max(map(len, help_text(["--help", "all"]).splitlines()))
    assert 70 < widest <= 80


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["-h", "model"], ["--help", "model"]),
        (["--help", "plan"], ["plan", "--help"]),
        (["plan", "--help", "nonsense"], ["plan", "--help"]),
        (["--config", "x.yaml", "plan", "--help", "model"], ["plan", "--help"]),
        (["--help", "--config", "x.yaml", "plan"], ["plan", "--help"]),
        (["--config", "x.yaml", "--help"], ["--help"]),
        (["--help", "--run.dir", "x"], ["--help"]),
        (["--help", ""], ["--help"]),
    ],
)
def test_what_a_line_asks_for(words, same):
    assert help_text(words) == help_text(same)


@pytest.mark.parametrize("name", sorted(set(SECTIONS) & set(COMMANDS)))
def test_a_section_and_a_subcommand_of_one_name_are_both_shown(name):
    text = help_text(["--help", name])
    assert text.startswith(help_text([name, "--help"]))
    assert f"\n{name}: " in text
    assert f"  --{name}." in text


@pytest.mark.parametrize(
    ("topic", "named"),
    [
        ("run.steps", ["run.steps"]),
        ("logging.profile", ["logging.profile.steps", "logging.profile.memory"]),
        ("model.preset", ["model.preset"]),
    ],
)
def test_a_key_or_a_section_of_a_section_is_a_topic_too(unwrapped, topic, named):
    lines = help_text(["--help", topic]).splitlines()
    assert all(line.startswith(f"  --{topic}") for line in lines)
    assert set(named) <= {line.split()[0].removeprefix("--") for line in lines}


@pytest.mark.parametrize("topic", ["modle", "model.hidden_siz", "x" * 5000, "a\nb", "\udcff"])
def test_unknown_section_is_one_line_that_names_the_sections(capsys, topic):
    assert main(["--help", topic]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("--help: no such section (got '")
    for name in TOPICS:
        assert re.search(rf"\b{name}\b", line)


def test_main_prints_the_help_that_is_asked_for(capsys):
    assert main(["--help", "schedule"]) == 0
    assert capsys.readouterr().out == help_text(["--help", "schedule"])
