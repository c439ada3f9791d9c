"""--help names everything there is."""

import re

from qwen3next_train.cli.commands import COMMANDS, TRAIN
from qwen3next_train.cli.help_text import help_text
from qwen3next_train.config import megatron
from qwen3next_train.config.describe import keys


def test_every_key_has_one_line_with_type_and_default():
    text = help_text(TRAIN)
    for key in keys().values():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [f"--{key.name}"]]
        assert key.description in line
        assert line.endswith(f"[{key.type_text}; default {key.default}]")


def test_every_megatron_spelling_has_one_line():
    text = help_text(TRAIN)
    for argument in megatron.arguments():
        assert len(re.findall(rf"^  {re.escape(argument.flag)} +\S", text, re.MULTILINE)) == 1


def test_every_subcommand_has_its_own_options():
    for command in COMMANDS.values():
        text = help_text(command)
        for option in command.options:
            assert f"  {option.name} {option.metavar}".rstrip() in text
        assert ("--gpus" in text) == (command.name == "plan")
        assert f"  {command.name} " in help_text(TRAIN)
