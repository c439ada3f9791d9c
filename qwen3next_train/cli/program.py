"""What a command line asks for: help, a subcommand with its options and keys."""

from __future__ import annotations

import sys

from qwen3next_train import __version__
from qwen3next_train.cli.arguments import Arguments, parse_arguments
from qwen3next_train.cli.command import Command
from qwen3next_train.cli.commands import COMMANDS, OPTIONS, TRAIN, load
from qwen3next_train.cli.help_text import help_text
from qwen3next_train.config.describe import to_yaml
from qwen3next_train.config.error_lines import meant, show
from qwen3next_train.errors import ConfigError, ExitCode
from qwen3next_train.imports import import_numpy
from qwen3next_train.train.held_signals import release_stop_signals


def run_program(argv: list[str]) -> tuple[int, bool]:
    """Do what a command line asks for.

    Args:
        argv: arguments after the program's name.

    Returns:
        The exit code, and whether what it was asked for is on standard output.

    Raises:
        TrainError: one line for everything that is wrong.
        OSError: there is no room for numpy.
    """
    # Help and version answer even when the rest of the line is wrong.
    if "--version" in argv:
        return _print(f"qwen3next-train {__version__}\n")
    if "--help" in argv or "-h" in argv:
        return _print(help_text(argv))
    args = parse_arguments(argv, OPTIONS)
    command = _take_command(args)
    if "--print-config" in args.options:
        return _print(to_yaml(load(args).config))
    trains = command is TRAIN and "--dry-run" not in args.options
    if not trains:
        release_stop_signals()
        import_numpy()
    return command.run(args), not trains


def _take_command(args: Arguments) -> Command:
    """The subcommand; its name is taken out of ``args.positional``.

    Raises:
        ConfigError: on an unexpected argument, or an option or configuration key of another subcommand.
    """
    command = TRAIN
    if args.positional and args.positional[0] in COMMANDS:
        command = COMMANDS[args.positional.pop(0)]
    if len(args.positional) > command.max_positional:
        extra = args.positional[command.max_positional]
        hint = meant(extra, COMMANDS)
        if hint.startswith("no key"):
            hint = "an option takes one value, a list as '[a, b]';"
        if extra.endswith((".yaml", ".yml")):
            hint = "name a configuration with --config"
        if extra in COMMANDS:
            hint = f"{command.name} is the subcommand already;"
        raise ConfigError(
            f"qwen3next-train: unexpected argument {show(extra)}; {hint} --help lists subcommands and sections"
        )
    own = {option.name for option in command.all_options}
    for name in args.options:
        if name not in own:
            owners = [each.name for each in COMMANDS.values() if name in {option.name for option in each.all_options}]
            raise ConfigError(f"{name}: not an option of {command.name}; it belongs to {', '.join(owners)}")
    command.check_keys(args)
    return command


def _print(text: str) -> tuple[int, bool]:
    sys.stdout.write(text)
    return ExitCode.FINISHED, True
